"""Attention to a fixed number of mixtures of tokens. Not causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import attend, check_length, check_positive


class Linformer(nn.Module):
    """softmax(Q (E K)^T / sqrt(D)) F V, Wang et al. 2020 (arXiv 2006.04768, equation 7).

    E and F mix tokens of the whole sequence, so every output depends on every token: the attention
    is bidirectional. Shorter sequences use the first T columns of E and F.

    Args:
        head_dim: ignored.
        num_heads: ignored, because heads share E and F, as in the paper.
        max_len: the longest T.
        rank: number of rows in E and F; 256 in the paper.
    """

    def __init__(
        self, head_dim: int, num_heads: int, *, max_len: int = 2048, rank: int = 256
    ) -> None:
        super().__init__()
        check_positive(max_len=max_len, rank=rank)
        self.keys, self.values = (
            nn.Parameter(torch.randn(rank, max_len) * max_len**-0.5) for _ in "kv"
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        t = q.shape[1]
        check_length(t, self.keys.shape[1])
        k, v = (
            torch.einsum("rt,bthd->brhd", w[:, :t].to(x.dtype), x)
            for w, x in ((self.keys, k), (self.values, v))
        )
        return attend(torch.einsum("bthd,brhd->bhtr", q, k) * q.shape[-1] ** -0.5, v)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"rank={self.keys.shape[0]}, max_len={self.keys.shape[1]}"
