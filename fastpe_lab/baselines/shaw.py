"""Relative attention with a table of clipped distances for keys and one for values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import causal, check_positive


class Shaw(nn.Module):
    """Relative position representations, Shaw et al. 2018 (arXiv 1803.02155, equations 3 and 4).

    a_ij = softmax_j(q_i . (k_j + w^K_c) / sqrt(D)), o_i = sum_(j <= i) a_ij (v_j + w^V_c) with
    c = min(i - j, max_distance). Heads share the tables. As in the paper, every pair has its w_c in
    memory, [T, T, D]; skewing would avoid that.

    Args:
        head_dim: D, also the values' size.
        num_heads: H.
        max_distance: limit at which larger distances are clipped; 16 in the paper.
    """

    def __init__(self, head_dim: int, num_heads: int, *, max_distance: int = 16) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, max_distance=max_distance)
        self.max_distance = max_distance
        self.keys, self.values = (
            nn.Parameter(torch.randn(max_distance + 1, head_dim) * head_dim**-0.5) for _ in "kv"
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        t, d = q.shape[1], q.shape[-1]
        place = torch.arange(t, device=q.device)
        row = (place[:, None] - place).clamp(0, self.max_distance)
        w_k, w_v = (F.embedding(row, w.to(q.dtype)) for w in (self.keys, self.values))
        logits = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bthd,tsd->bhts", q, w_k)
        logits = logits.masked_fill(~causal(t, q.device), -torch.inf) * d**-0.5
        weights = logits.softmax(-1)
        o = torch.einsum("bhts,bshe->bthe", weights, v)
        return o + torch.einsum("bhts,tse->bthe", weights, w_v)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"max_distance={self.max_distance}"
