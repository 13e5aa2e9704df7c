"""Segments with a memory, and a coarser memory for older tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import attend, causal, check_positive, in_blocks, previous
from .transformer_xl import RelativeLogits

KINDS = ("mean", "max", "conv")


class Compressive(nn.Module):
    """Compressive Transformer, Rae et al. 2020 (arXiv 1911.05507).

    A token attends to its own segment up to itself, to the segment before (the memory), and to the
    last `compressed` slots of older tokens. A slot merges `rate` tokens into their mean, their
    maximum, or a convolution with that stride. Logits are Transformer-XL's with distances counted
    in slots. The memories get no gradient.

    The convolution learns only from the attention-reconstruction loss (algorithm 2): the mean
    square of att(q, old) - att(q, compressed), where each segment's queries see the memory that it
    forgets, without positions. A forward with gradients stores this loss in `auxiliary_loss`;
    otherwise that is None.

    We compress keys and values, each head by itself. The paper compresses hidden states and then
    projects them. For the mean both are the same.

    Args:
        head_dim: D.
        num_heads: H.
        kind: "mean", "max" or "conv".
        memory: number of tokens in the memory and in a segment, a multiple of rate.
        compressed: number of slots in the compressed memory.
        rate: number of tokens in a slot.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kind: str = "mean",
        *,
        memory: int = 64,
        compressed: int = 256,
        rate: int = 4,
    ) -> None:
        super().__init__()
        check_positive(memory=memory, compressed=compressed, rate=rate)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if memory % rate:
            raise ValueError(f"memory must be a multiple of rate = {rate}, got {memory}")
        self.kind, self.memory, self.compressed, self.rate = kind, memory, compressed, rate
        self.logits = RelativeLogits(head_dim, num_heads)
        # filters for keys, then for values
        shape = (2, num_heads, rate, head_dim, head_dim)
        filters = nn.Parameter(torch.randn(shape) * (rate * head_dim) ** -0.5)
        self.register_parameter("filters", filters if kind == "conv" else None)
        self.auxiliary_loss: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return o, [B, T, H, D]; set auxiliary_loss.

        Args:
            q: [B, T, H, D], like k and v.
            positions: ignored.
            memory: keys and values for all tokens, made from inputs without gradients, so that
                projections learn from the memories. Default: k and v without gradients.
        """
        t = q.shape[1]
        old = (k.detach(), v.detach()) if memory is None else memory
        q, k, v, *old = (in_blocks(x, self.memory) for x in (q, k, v, *old))  # [B, N, S, H, D]
        self.auxiliary_loss = None
        if torch.is_grad_enabled():
            self.auxiliary_loss = self._reconstruction(q.detach(), [x.detach() for x in old], t)
        filters = None if self.filters is None else self.filters.detach()
        coarse = (self._window(x) for x in self._compress(old, filters))
        k, v = (
            torch.cat((c, previous(m), x), 2) for c, m, x in zip(coarse, old, (k, v), strict=True)
        )
        return attend(self.logits(q, k), v, self._visible(q)).flatten(1, 2)[:, :t]

    def _compress(self, old: list[Tensor], filters: Tensor | None) -> list[Tensor]:
        """Return keys and values [B, N, S, H, D] with `rate` of them merged into one."""
        old = [x.unflatten(2, (-1, self.rate)) for x in old]
        if self.kind == "mean":
            return [x.mean(3) for x in old]
        if self.kind == "max":
            return [x.amax(3) for x in old]
        return [
            torch.einsum("bnsrhd,hrde->bnshe", x, w.to(x.dtype))
            for x, w in zip(old, filters, strict=True)
        ]

    def _window(self, slots: Tensor) -> Tensor:
        """Return each segment's compressed memory, [B, N, compressed, H, D]: its last slots.

        Args:
            slots: slots of each segment, [B, N, S / rate, H, D]; the memory's slots are left out.
        """
        count, per_segment = slots.shape[1:3]
        slots = slots.flatten(1, 2)
        slots = F.pad(slots, (0, 0, 0, 0, self.compressed + per_segment, 0))
        return slots.unfold(1, self.compressed, per_segment)[:, :count].movedim(-1, 2)

    def _visible(self, q: Tensor) -> Tensor:
        """Return which keys each query sees, [N, 1, S, compressed + 2 S]."""
        count, size = q.shape[1:3]
        segment = torch.arange(count, device=q.device)[:, None]
        slot = torch.arange(self.compressed, device=q.device)
        made = slot + (segment - 1) * (size // self.rate) >= self.compressed
        past = torch.cat((made, (segment >= 1).expand(-1, size)), 1)
        past = past[:, None, None].expand(-1, 1, size, -1)
        here = causal(size, q.device).expand(count, 1, -1, -1)
        return torch.cat((past, here), -1)

    def _reconstruction(self, q: Tensor, old: list[Tensor], length: int) -> Tensor:
        """Return the loss over the segments after the first; 0 if there is none."""
        rest = length - self.memory
        if rest <= 0:
            return q.new_zeros(())
        q, old = q[:, 1:] * q.shape[-1] ** -0.5, [x[:, :-1] for x in old]
        seen = [
            attend(torch.einsum("bnthd,bnshd->bnhts", q, k), v)
            for k, v in (old, self._compress(old, self.filters))
        ]
        # the last segment may end early
        return (seen[0] - seen[1]).flatten(1, 2)[:, :rest].square().mean()

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"kind={self.kind!r}, memory={self.memory}, compressed={self.compressed}, "
            f"rate={self.rate}"
        )
