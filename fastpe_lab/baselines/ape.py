"""Absolute positional encodings, which are added to the input of a Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import check_positive, labels, sinusoids


class LearnedAPE(nn.Module):
    """Adds a learned row of a table to each token, Gehring et al. 2017 (arXiv 1705.03122).

    Args:
        dim: size of the input.
        max_len: number of rows in the table.
    """

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        check_positive(dim=dim, max_len=max_len)
        self.table = nn.Parameter(0.02 * torch.randn(max_len, dim))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return x with its positions added.

        Args:
            x: [B, T, dim].
            positions: rows of the table, whole numbers [T] or [B, T]; default 0, 1, 2, ...

        Raises:
            ValueError: a position lies outside the table.
        """
        rows, max_len = _places(x, positions).long(), len(self.table)
        if rows.numel() and not (rows.min() >= 0 and rows.max() < max_len):
            raise ValueError(
                f"positions must lie in 0 ... {max_len - 1} (max_len {max_len}), "
                f"got {int(rows.min())} ... {int(rows.max())}"
            )
        return x + self.table[rows].to(x.dtype)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"dim={self.table.shape[1]}, max_len={len(self.table)}"


class SinusoidalAPE(nn.Module):
    """Adds sines and cosines of the position, Vaswani et al. 2017 (arXiv 1706.03762, section 3.5).

    e[n, 2i] = sin(n 10000^(-2i / dim)), e[n, 2i + 1] = cos(...).

    Args:
        dim: size of the input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.dim = dim

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return x [B, T, dim] with its positions, [T] or [B, T], added; default 0, 1, 2, ..."""
        return x + sinusoids(_places(x, positions), self.dim).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"dim={self.dim}"


class StructuralAPE(nn.Module):
    """S-APE: adds sines of structure labels, Agarwal et al. 2024 (arXiv 2402.13301).

    x_i + sum_l W_l e(s_il), where e are sinusoids and each level has a learned matrix W_l.
    `stripe.Stripe` uses the same terms for differences of labels. The published code has no
    matrices, or a learned table for each level.

    Args:
        dim: size of the input.
        num_levels: L, the number of components in a label.
        base: base of the sinusoids; the default is the published one for chords.
    """

    def __init__(self, dim: int, num_levels: int, *, base: float = 10001.0) -> None:
        super().__init__()
        check_positive(dim=dim, num_levels=num_levels)
        self.base = base
        self.weight = nn.Parameter(torch.randn(num_levels, dim, dim) * dim**-0.5)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return x with its labels added.

        Args:
            x: [B, T, dim].
            positions: structure labels, [T], [B, T], [T, L] or [B, T, L].

        Raises:
            ValueError: positions are None or of another shape.
        """
        levels, dim, _ = self.weight.shape
        e = sinusoids(labels(positions, x.shape[1], levels), dim, self.base)
        return x + torch.einsum("btld,lde->bte", e.to(x.dtype), self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """Return the configuration."""
        levels, dim, _ = self.weight.shape
        return f"dim={dim}, num_levels={levels}, base={self.base}"


def _places(x: Tensor, positions: Tensor | None) -> Tensor:
    # [T] or [B, T]
    if positions is None:
        return torch.arange(x.shape[1], device=x.device)
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"positions must be [T] or [B, T] with B, T = {tuple(x.shape[:2])}, "
            f"got {tuple(positions.shape)}"
        )
    return positions
