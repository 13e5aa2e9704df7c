"""Relative attention by skewing, over all tokens or over blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import attend, causal, check_positive, in_blocks, previous, skew


class MusicTransformer(nn.Module):
    """Relative global attention, Huang et al. 2018 (arXiv 1809.04281, section 3.4.1).

    softmax((Q K^T + S) / sqrt(D)) V, causal, S = skew(Q E^T), S_ij = q_i . e_(i - j).

    Args:
        head_dim: D.
        num_heads: H; each head has its own table of distances.
        max_distance: limit at which larger distances are clipped; the paper takes half its training
            length of 2048.
    """

    def __init__(self, head_dim: int, num_heads: int, *, max_distance: int = 1024) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, max_distance=max_distance)
        self.distances = _table(num_heads, max_distance + 1, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        t, far = q.shape[1], self.distances.shape[1] - 1
        row = torch.arange(t - 1, -1, -1, device=q.device).clamp(max=far)
        relative = torch.einsum("bthd,hsd->bhts", q, self.distances[:, row].to(q.dtype))
        logits = torch.einsum("bthd,bshd->bhts", q, k) + skew(relative)
        return attend(logits * q.shape[-1] ** -0.5, v, causal(t, q.device))

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"max_distance={self.distances.shape[1] - 1}"


class LocalMusicTransformer(nn.Module):
    """Relative local attention, Huang et al. 2018 (arXiv 1809.04281, section 3.4.2).

    softmax((q_i . k_j + q_i . e_(i - j)) / sqrt(D)), where a token sees its own block up to itself,
    and the whole block before.

    Args:
        head_dim: D.
        num_heads: H; each head has its own table of distances.
        block: number of tokens in a block; 512 in the paper.
    """

    def __init__(self, head_dim: int, num_heads: int, *, block: int = 512) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, block=block)
        self.block = block
        self.distances = _table(num_heads, 2 * block, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        t = q.shape[1]
        # a piece shorter than a block is one block of its length
        size = min(self.block, t)
        q, k, v = (in_blocks(x, size) for x in (q, k, v))  # [B, N, size, H, D]
        k, v = (torch.cat((previous(x), x), 2) for x in (k, v))
        rows = self.distances[:, : 2 * size].flip(1).to(q.dtype)
        relative = torch.einsum("bnthd,hsd->bnhts", q, rows)
        logits = torch.einsum("bnthd,bnshd->bnhts", q, k) + skew(relative)
        visible = causal(size, q.device, before=size).repeat(q.shape[1], 1, 1, 1)
        visible[0, ..., :size] = False
        return attend(logits * q.shape[-1] ** -0.5, v, visible).flatten(1, 2)[:, :t]

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"block={self.block}"


def _table(heads: int, rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(heads, rows, width) * width**-0.5)
