"""The noise of a stochastic encoding, and pictures of any encoding's kernel."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ._checks import check_positive
from .encodings.base import PositionalEncoding


def signal_to_noise(
    encoding: PositionalEncoding,
    positions_q: Tensor,
    positions_k: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """Return mean / standard deviation of the product of a query's and a key's features.

    Gaussian noise gives sqrt(R) c / sqrt(1 + c^2) by Isserlis' theorem, for the codes of arXiv
    2105.08399. Here c = rho / sqrt(s_q s_k) is the correlation of codes weighted by content, with
    rho = q^T C k, s_q = sum_d q_d^2 C_d^0, s_k alike, and C^0 the mean square of a code.

    Orthogonal noise with M >= R rows projects to a uniform subspace of dimension R; its variance is
    M (M - R) / (R (M + 2) (M - 1)) (s_q s_k + (1 - 2 / M) rho^2). At multiples of M the variance is
    zero and the result infinite.

    Args:
        encoding: SineSPE, FStripe with num_realizations, or ConvSPE.
        positions_q: Position of the query, [...] for one level, else [..., L].
        positions_k: Position of the key, broadcast against positions_q; default 0.
        q: Query, [..., H, D], broadcast against the positions; default ones.
        k: Key, alike.
    Returns:
        [..., H], float64, with the sign of the mean.
    Raises:
        ValueError: the encoding has no noise.
    """
    if not isinstance(encoding, PositionalEncoding) or encoding.noise_key is None:
        raise ValueError(f"encoding must be one with noise, got {encoding}")
    c = encoding.kernel(positions_q, positions_k).diagonal(dim1=-2, dim2=-1)  # [..., H, D]
    q, k = (torch.ones(()).double() if x is None else x.detach().cpu().double() for x in (q, k))
    rho = (q * k * c).sum(-1)
    s_q, s_k = ((x**2 * encoding.power(side)).sum(-1) for x, side in ((q, "q"), (k, "k")))
    return rho / _variance(encoding, rho**2, s_q * s_k).sqrt()


def _variance(encoding: PositionalEncoding, squared: Tensor, power: Tensor) -> Tensor:
    """Return the variance of an estimate of rho; squared is rho^2, power s_q s_k."""
    r = encoding.num_realizations
    if getattr(encoding, "noise", "gaussian") == "gaussian":
        return (power + squared) / r
    m = encoding.head_dim * (2 * encoding.num_sines + encoding.gated)
    # full blocks are exact; the last block has `rest` columns
    rest = r % m
    factor = rest * m * (m - rest) / (r**2 * (m + 2) * (m - 1))
    return factor * (power + (1 - 2 / m) * squared)


def num_realizations_for(snr: float, correlation: float) -> int:
    """Return the smallest R that reaches a signal-to-noise ratio with Gaussian noise.

    R >= snr^2 (1 + c^2) / c^2, see `signal_to_noise`.

    Args:
        snr: Wanted mean / standard deviation, positive.
        correlation: Correlation c of codes weighted by content, in -1 .. 1 and not 0.
    Raises:
        ValueError, TypeError: an argument is not as above.
    """
    for name, x in (("snr", snr), ("correlation", correlation)):
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not snr > 0 or not math.isfinite(snr):
        raise ValueError(f"snr must be a positive number, got {snr!r}")
    if not 0 < abs(correlation) <= 1:
        raise ValueError(f"correlation must be in -1..1 and not 0, got {correlation!r}")
    return math.ceil(snr**2 * (1 + correlation**2) / correlation**2)


@torch.no_grad()
def estimate_kernel(
    encoding: PositionalEncoding,
    positions_q: Tensor,
    positions_k: Tensor | None = None,
    draws: int = 100,
) -> Tensor:
    """Return an estimate of `encoding.kernel` from features, averaged over draws of the noise.

    Each draw has R realisations. Your encoding keeps its noise.

    Args:
        encoding: Any encoding; without noise one draw suffices.
        positions_q: Positions of queries, [...] for one level, else [..., L].
        positions_k: Positions of keys, broadcast against positions_q; default 0.
        draws: Number of draws.
    Returns:
        [..., H, D, D], float64.
    Raises:
        ValueError: draws is not a positive int.
    """
    check_positive("draws", draws)
    positions_q, positions_k = (encoding._levels(x) for x in (positions_q, positions_k))
    content = torch.eye(encoding.head_dim, dtype=torch.float64)[:, None, None]
    total = 0
    for twin in _drawn(encoding, draws):
        codes_q = _codes(twin, content, positions_q, "q")
        codes_k = _codes(twin, content, positions_k, "k")
        total = total + codes_q @ codes_k.mT
    return total / (draws * _scale(encoding))


def content_kernel(
    encoding: PositionalEncoding, positions: Tensor, *, head: int = 0, draws: int | None = None
) -> Tensor:
    """Return the kernel for content that is the same everywhere, 1^T C 1 / D.

    Args:
        encoding: Any encoding.
        positions: Positions, [T] for one level, else [T, L].
        head: Index of the head.
        draws: Draws of the noise to estimate the kernel from; None for the closed form.
    Returns:
        [T, T], float64; rows are queries, columns keys.
    Raises:
        ValueError: head is out of range, or draws is not a positive int.
    """
    d, heads = encoding.head_dim, encoding.num_heads or 1
    if not 0 <= head < heads:
        raise ValueError(f"head must be in 0..{heads - 1}, got {head}")
    if draws is None:
        # unique positions only, row by row: all of C would be D^2 times as large
        places, which = torch.as_tensor(positions).unique(dim=0, return_inverse=True)
        rows = (encoding.kernel(p[None], places).sum((-2, -1)) for p in places)
        rows = torch.stack([row[:, head if row.shape[1] > 1 else 0] for row in rows])
        return rows[which][:, which] / d
    check_positive("draws", draws)
    at, total = encoding._levels(positions), 0
    with torch.no_grad():
        for twin in _drawn(encoding, draws):
            ones = torch.ones(1, 1, 1, d, dtype=torch.float64)
            q, k = (_codes(twin, ones, at, side)[:, head, 0] for side in "qk")
            total = total + q @ k.T
    return total / (draws * d * _scale(encoding))


def plot_kernel(
    encoding: PositionalEncoding,
    positions: Tensor,
    where: str | PathLike | Sequence[Any],
    *,
    head: int = 0,
    draws: int = 16,
) -> tuple[Tensor, Tensor]:
    """Plot `content_kernel` in closed form and as estimated from features.

    Args:
        encoding: Any encoding.
        positions: Positions, [T] for one level, else [T, L].
        where: Path of the picture to write, or two matplotlib axes.
        head: Index of the head.
        draws: Draws of the noise for the estimate.
    Returns:
        Closed form and estimate, [T, T] each.
    Raises:
        ImportError: where is a path and matplotlib is not installed.
    """
    if isinstance(where, (str, PathLike)):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot_kernel needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots(1, 2)
        axes[0].set_title("closed form")
        axes[1].set_title("from features")
        found = plot_kernel(encoding, positions, axes, head=head, draws=draws)
        figure.savefig(where)
        return found
    found = [content_kernel(encoding, positions, head=head, draws=n) for n in (None, draws)]
    limit = found[0].abs().max().item()
    for axis, values in zip(where, found, strict=True):
        colors = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
        axis.imshow(values.detach().numpy(), interpolation="nearest", **colors)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    return tuple(found)


def _drawn(encoding: PositionalEncoding, draws: int) -> Iterator[PositionalEncoding]:
    """Yield one float64 copy of the encoding, with new noise each time."""
    twin = copy.deepcopy(encoding).cpu().double()
    for i in range(draws):
        if i and twin.noise_key is not None:
            twin.resample_()
        yield twin


def _codes(
    encoding: PositionalEncoding, content: Tensor, positions: Tensor, side: str
) -> Tensor:  # [..., H, N, R] for content [N, 1, 1, D] at positions [..., L]
    *at, levels = positions.shape
    x = content.expand(-1, math.prod(at), encoding.num_heads or 1, -1)
    y = encoding.features(x, positions.reshape(1, -1, levels), side)
    return y.permute(1, 2, 0, 3).reshape(*at, *y.shape[2:3], *y.shape[::3])


def _scale(encoding: PositionalEncoding) -> float:
    """Return the ratio of products of features to the kernel."""
    if getattr(encoding, "scale", "matched") == "paper":
        return 1.0
    return (encoding.feature_dim / encoding.head_dim) ** 0.5
