"""Relative positions in a structure, with quadratic memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import attend, causal, check_positive, labels, sinusoids


class Stripe(nn.Module):
    """S-RPE and SS-RPE of StrIPE, Agarwal et al. 2024 (arXiv 2402.13301).

    softmax((q_i . k_j + sum_l q_i . W_l e_l(s_il - s_jl)) / sqrt(D)), causal, where s are labels on
    L levels of structure. e_l is a learned table of differences, or fixed sines of differences.
    Each head has its own matrices W_l. A W_l is the product of two matrices in the published code,
    whose biases change no softmax. As in the paper, every pair has its e in memory, [B, T, T, D];
    the published e has H D entries, and H times the memory.

    Args:
        head_dim: D.
        num_heads: H.
        num_levels: L.
        sines: whether e are sines (SS-RPE), else a table (S-RPE).
        max_difference: limit at which S-RPE clips differences in both directions; 128, 395 and 52
            in the paper.
        base: base of the sines; 10001 for chords in the paper.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_levels: int = 1,
        *,
        sines: bool = False,
        max_difference: int = 128,
        base: float = 10001.0,
    ) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, num_levels=num_levels)
        check_positive(max_difference=max_difference)
        self.base, self.max_difference = base, max_difference
        shape = (num_levels, num_heads, head_dim, head_dim)
        self.weight = nn.Parameter(torch.randn(shape) * head_dim**-0.5)
        rows = 2 * max_difference + 1
        table = None if sines else nn.Parameter(torch.randn(num_levels, rows, head_dim))
        self.register_parameter("table", table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v.

        Args:
            q: [B, T, H, D], like k and v.
            positions: structure labels, [T], [B, T], [T, L] or [B, T, L]; S-RPE rounds them to
                whole numbers.

        Raises:
            ValueError: positions are None or of another shape.
        """
        t, d = q.shape[1], q.shape[-1]
        logits = torch.einsum("bthd,bshd->bhts", q, k)
        s = labels(positions, t, len(self.weight))
        wide = torch.promote_types(q.dtype, torch.float32)
        for level, weight in enumerate(self.weight.to(q.dtype)):
            e = self._encoded(s[..., level], level, wide).to(q.dtype).expand(len(q), -1, -1, -1)
            turned = torch.einsum("bthd,hde->bthe", q, weight)
            logits = logits + torch.einsum("bthe,btse->bhts", turned, e)
        return attend(logits * d**-0.5, v, causal(t, q.device))

    def _encoded(self, s: Tensor, level: int, dtype: torch.dtype) -> Tensor:
        """Return e for the differences of labels [B or 1, T]: [B or 1, T, T, D]."""
        if self.table is None:
            lag = s[:, :, None].double() - s[:, None].double()
            return sinusoids(lag, self.weight.shape[-1], self.base, dtype)
        s = s.double().round().long()
        far = self.max_difference
        return F.embedding((s[:, :, None] - s[:, None]).clamp(-far, far) + far, self.table[level])

    def extra_repr(self) -> str:
        """Return the configuration."""
        kind = (
            f"base={self.base}" if self.table is None else f"max_difference={self.max_difference}"
        )
        return f"num_levels={len(self.weight)}, sines={self.table is None}, {kind}"
