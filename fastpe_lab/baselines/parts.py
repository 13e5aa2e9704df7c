"""Functions that several baselines share: masked softmax, blocks, skewing, sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(logits: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return softmax attention, [..., T, H, E].

    Args:
        logits: [..., H, T, S].
        v: [..., S, H, E].
        visible: bool [..., T, S], the keys that each query sees; default all.
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    return torch.einsum("...hts,...she->...the", logits.softmax(-1), v)


def causal(length: int, device: torch.device, before: int = 0) -> Tensor:
    """Return the keys that each of T queries sees, bool [T, before + T]."""
    ones = torch.ones(length, before + length, dtype=torch.bool, device=device)
    return ones.tril(before)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Return x [B, T, ...] in blocks [B, N, size, ...], padded with zeros."""
    pad = -x.shape[1] % size
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, size))


def previous(blocks: Tensor) -> Tensor:
    """Return the block before each, [B, N, size, ...], zeros before the first."""
    return F.pad(blocks, (0, 0) * (blocks.ndim - 2) + (1, 0))[:, :-1]


def skew(x: Tensor) -> Tensor:
    """Turn columns for distances into columns for keys, [..., T, S] with S >= T.

    Column c of x belongs to the distance S - 1 - c. Column j of the result belongs to key j, where
    the last of S keys is at the last query: out[i, j] = x[i, T - 1 - i + j]. Entries after a query
    are garbage: mask them. Huang et al. 2018 (arXiv 1809.04281), section 3.4.1.
    """
    t, s = x.shape[-2:]
    return F.pad(x, (1, 0)).flatten(-2)[..., t:].unflatten(-1, (t, s))


def sinusoids(
    positions: Tensor, dim: int, base: float = 1e4, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return alternating sines and cosines of positions, [..., dim].

    e[n, 2i] = sin(n base^(-2i / dim)), e[n, 2i + 1] = cos(...), Vaswani et al. 2017 (section 3.5).
    The dtype must be float32 or float64.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.to(dtype)[..., None] * (base ** (-steps / dim)).to(dtype)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., :dim]


def check_positive(**sizes: int) -> None:
    """Raise ValueError unless all are positive ints."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def check_length(length: int, max_len: int) -> None:
    """Raise ValueError if a sequence is longer than the module allows."""
    if length > max_len:
        raise ValueError(f"T must be at most max_len = {max_len}, got {length}")


def labels(positions: Tensor | None, length: int, num_levels: int) -> Tensor:
    """Return structure labels as [B or 1, T, L].

    Args:
        positions: [T], [B, T], [T, L] or [B, T, L]; the first two need L = 1.
        length: T.
        num_levels: L.

    Raises:
        ValueError: positions are None or of another shape.
    """
    if positions is None:
        raise ValueError("positions must be given: the structure labels of the tokens")
    found = positions
    if num_levels == 1 and positions.ndim <= 2 and positions.shape[-1] == length:
        found = positions[..., None]
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[1:] != (length, num_levels):
        wanted = "[T], [B, T], [T, L] or [B, T, L]" if num_levels == 1 else "[T, L] or [B, T, L]"
        raise ValueError(
            f"positions must be {wanted} with T = {length}, L = {num_levels}, "
            f"got {tuple(positions.shape)}"
        )
    return found
