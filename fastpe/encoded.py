"""Positional maps by the operators, or by reference.py for the backend of that name."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .maps import Rotation, SineMap
from .ops import phase_features


def encoded(
    x: Tensor, positions: Tensor | None, position_map: Rotation | SineMap | None, backend: str
) -> Tensor:
    """Return what a feature map sees of queries or keys, [B, T, H, R]."""
    if position_map is None:
        return x
    if isinstance(position_map, Rotation):
        return reference.rotate(x, positions, position_map)
    if backend == "reference":
        return reference.sine_features(x, positions, position_map)
    return phase_features(x, positions, position_map, backend=backend)
