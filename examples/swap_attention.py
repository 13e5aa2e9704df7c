"""Swap the softmax attention of a PyTorch model for fastpe's, weights kept, and train on.

    python examples/swap_attention.py [--length 4096] [--steps 60]

A small GPT of nn.TransformerEncoderLayer learns to continue repeated motifs. `swap_` then replaces
every nn.MultiheadAttention in it; printed are the times of a long sequence and the losses before
the swap, after it, and after as many steps more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpe

VOCABULARY, PERIOD = 32, 8


class SwappedAttention(fastpe.nn.CausalLinearAttention):
    """fastpe's layer with the projections of an nn.MultiheadAttention, called as that is.

    Args:
        mha: Causal self-attention, batch_first; what it drops out, weights, is not there any more.
        options: options of `fastpe.nn.CausalLinearAttention`.

    Raises:
        ValueError: mha is not batch_first or not made for self-attention.
    """

    batch_first = True
    # tells nn.TransformerEncoderLayer that its fused softmax attention is not for this
    _qkv_same_embed_dim = False

    def __init__(self, mha: nn.MultiheadAttention, **options: object) -> None:
        plain = mha.bias_k is None and not mha.add_zero_attn
        if not (mha.batch_first and mha._qkv_same_embed_dim and plain):
            raise ValueError(
                "mha must be batch_first with keys and values of embed_dim and none added, "
                f"got {mha}, batch_first={mha.batch_first}"
            )
        weight, bias = mha.in_proj_weight, mha.in_proj_bias is not None
        factory = {"device": weight.device, "dtype": weight.dtype}
        super().__init__(mha.embed_dim, mha.num_heads, bias=bias, **factory, **options)
        # both keep the rows of q, k and v in this order
        self.in_proj.weight = mha.in_proj_weight
        self.out_proj.weight = mha.out_proj.weight
        if bias:
            self.in_proj.bias, self.out_proj.bias = mha.in_proj_bias, mha.out_proj.bias
        self.train(mha.training)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Where nn.TransformerEncoderLayer looks for it."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return y [B, T, embed_dim] and no weights."""
        if query is not key or key is not value:
            raise ValueError("query, key and value must be one tensor: this is self-attention")
        if not is_causal and not _is_causal(attn_mask, query.shape[1]):
            raise ValueError("attn_mask must be the causal one, or is_causal=True")
        return super().forward(query, key_padding_mask=_hidden(key_padding_mask)), None


def _hidden(mask: Tensor | None) -> Tensor | None:
    # PyTorch hides what is True, or -inf in a mask of floats
    return mask if mask is None or mask.dtype == torch.bool else mask == -torch.inf


def _is_causal(mask: Tensor | None, length: int) -> bool:
    if mask is None:
        return False
    future = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(_hidden(mask), future)


def swap_(
    model: nn.Module,
    make_encoding: Callable[[int, int], fastpe.PositionalEncoding] | None = None,
    **options: object,
) -> int:
    """Replace every nn.MultiheadAttention in a model, in place; return how many there were.

    Args:
        model: Whose attention is causal self-attention.
        make_encoding: head_dim, num_heads to the encoding of a layer; default none.
        options: options of `fastpe.nn.CausalLinearAttention`, such as feature_map.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention)
    ]
    for parent, name, mha in found:
        encoding = make_encoding(mha.head_dim, mha.num_heads) if make_encoding else None
        setattr(parent, name, SwappedAttention(mha, pos_encoding=encoding, **options))
    return len(found)


class GPT(nn.Module):
    """A decoder-only model of PyTorch's own layers."""

    def __init__(self, dim: int = 128, heads: int = 4, layers: int = 2, length: int = 4096) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, VOCABULARY] for tokens [B, T]."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.token(tokens) + self.position.weight[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


def train(model: nn.Module, steps: int, motifs: Tensor) -> tuple[float, float]:
    """Learn to continue motifs [N, PERIOD], repeated; return the first loss and the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        tokens = motifs[torch.randint(len(motifs), (16,))].repeat(1, 8)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def milliseconds(model: nn.Module, length: int) -> float:
    """Return the time of a forward over one sequence, the median of five."""
    tokens, times = torch.randint(VOCABULARY, (1, length)), []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            model(tokens)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main(argv: list[str] | None = None) -> None:
    """Train, swap, and train on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="of the sequence that is timed")
    parser.add_argument("--steps", type=int, default=60, help="of training, before and after")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model, motifs = GPT(length=max(args.length, 64)), torch.randint(VOCABULARY, (64, PERIOD))
    first, last = train(model, args.steps, motifs)
    before = milliseconds(model, args.length)
    print(f"softmax: loss {first:.3f} -> {last:.3f}; {before:.1f} ms for {args.length} tokens")
    count = swap_(model, fastpe.RoPE)
    first, last = train(model, args.steps, motifs)
    after = milliseconds(model, args.length)
    print(
        f"fastpe, {count} layers swapped: loss {first:.3f} -> {last:.3f}; {after:.1f} ms, "
        f"{before / after:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
