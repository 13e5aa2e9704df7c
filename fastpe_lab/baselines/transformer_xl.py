"""Segments with the previous segment as memory, and sinusoidal relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import attend, causal, check_positive, in_blocks, previous, sinusoids, skew


class RelativeLogits(nn.Module):
    """Logits of Transformer-XL, Dai et al. 2019 (arXiv 1901.02860, section 3.3).

    ((q_i + u) . k_j + (q_i + v) . W r_(i - j)) / sqrt(D), r the sinusoids of H D entries.

    Args:
        head_dim: D.
        num_heads: H.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads)
        dim = head_dim * num_heads
        self.weight = nn.Parameter(torch.randn(dim, num_heads, head_dim) * dim**-0.5)
        self.u, self.v = (nn.Parameter(torch.zeros(num_heads, head_dim)) for _ in "uv")

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the logits, [B, N, H, T, S], for T queries at the last T of S keys; S >= T.

        Args:
            q: [B, N, T, H, D].
            k: [B, N, S, H, D].
        """
        distance = torch.arange(k.shape[2] - 1, -1, -1, device=q.device)
        r = sinusoids(distance, len(self.weight)).to(q.dtype)
        r = torch.einsum("sc,chd->shd", r, self.weight.to(q.dtype))
        content = torch.einsum("bnthd,bnshd->bnhts", q + self.u.to(q.dtype), k)
        relative = torch.einsum("bnthd,shd->bnhts", q + self.v.to(q.dtype), r)
        return (content + skew(relative)) * q.shape[-1] ** -0.5


class TransformerXL(nn.Module):
    """Attention to the segment up to the token, and to the whole segment before as a memory.

    Dai et al. 2019 (arXiv 1901.02860). The memory gets no gradient. It holds keys and values; the
    paper remembers hidden states and projects them again. A layer that gives `memory` does the same
    as the paper.

    Args:
        head_dim: D.
        num_heads: H.
        segment: number of tokens in a segment and in its memory; 512 in the paper (enwik8).
    """

    def __init__(self, head_dim: int, num_heads: int, *, segment: int = 512) -> None:
        super().__init__()
        check_positive(segment=segment)
        self.segment = segment
        self.logits = RelativeLogits(head_dim, num_heads)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return o, [B, T, H, D].

        Args:
            q: [B, T, H, D], like k and v.
            positions: ignored.
            memory: keys and values for all tokens, made from inputs without gradients, so that
                projections learn from the memory. Default: k and v without gradients.
        """
        t = q.shape[1]
        # a piece shorter than a segment is one segment of its length
        size = min(self.segment, t)
        old = (k.detach(), v.detach()) if memory is None else memory
        q, k, v, *old = (in_blocks(x, size) for x in (q, k, v, *old))  # [B, N, size, H, D]
        k, v = (torch.cat((previous(x), y), 2) for x, y in zip(old, (k, v), strict=True))
        visible = causal(size, q.device, before=size).repeat(q.shape[1], 1, 1, 1)
        visible[0, ..., :size] = False
        return attend(self.logits(q, k), v, visible).flatten(1, 2)[:, :t]

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"segment={self.segment}"
