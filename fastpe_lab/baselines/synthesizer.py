"""Attention weights that are not products of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import attend, causal, check_length, check_positive


class DenseSynthesizer(nn.Module):
    """A token alone makes its weights, Tay et al. 2021 (arXiv 2005.00743, section 3.1).

    softmax_j((W_2 relu(W_1 q_i + b_1) + b_2)_j), causal here, with the token's projection q_i in
    place of the paper's x_i; k is ignored. Row j of W_2 learns only from sequences that reach j.

    Args:
        head_dim: D.
        num_heads: H; each head has its own weights.
        max_len: the longest T.
    """

    def __init__(self, head_dim: int, num_heads: int, *, max_len: int = 2048) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, max_len=max_len)
        self.first, self.second = (
            nn.Parameter(torch.randn(num_heads, width, head_dim) * head_dim**-0.5)
            for width in (head_dim, max_len)
        )
        self.first_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.second_bias = nn.Parameter(torch.zeros(num_heads, max_len))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q and v, [B, T, H, D]; k and positions are ignored."""
        t = q.shape[1]
        check_length(t, self.second.shape[1])
        hidden = torch.einsum("bthd,hed->bthe", q, self.first.to(q.dtype))
        hidden = (hidden + self.first_bias.to(q.dtype)).relu()
        logits = torch.einsum("bthe,hse->bhts", hidden, self.second[:, :t].to(q.dtype))
        logits = logits + self.second_bias[:, None, :t].to(q.dtype)
        return attend(logits, v, causal(t, q.device))

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"max_len={self.second.shape[1]}"


class RandomSynthesizer(nn.Module):
    """Learned weights that depend on no token, Tay et al. 2021 (arXiv 2005.00743, section 3.2).

    softmax_j((R_1 R_2^T)_ij), causal here: the factorised variant; q and k are ignored.

    Args:
        head_dim: ignored.
        num_heads: H; each head has its own weights.
        max_len: the longest T.
        rank: number of columns in R_1 and R_2; 8 in the paper.
    """

    def __init__(
        self, head_dim: int, num_heads: int, *, max_len: int = 2048, rank: int = 8
    ) -> None:
        super().__init__()
        check_positive(num_heads=num_heads, max_len=max_len, rank=rank)
        self.rows, self.columns = (
            nn.Parameter(torch.randn(num_heads, max_len, rank)) for _ in "rc"
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from v [B, T, H, D]; q, k and positions are ignored."""
        t = v.shape[1]
        check_length(t, self.rows.shape[1])
        rows, columns = (x[:, :t].to(v.dtype) for x in (self.rows, self.columns))
        logits = torch.einsum("htr,hsr->hts", rows, columns)
        return attend(logits, v, causal(t, v.device))

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"max_len={self.rows.shape[1]}, rank={self.rows.shape[2]}"
