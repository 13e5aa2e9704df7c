"""Position maps applied before a feature map: rotations in PyTorch, sines by the operator."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference
from ..backends.specs import Rotation, SineMap
from .sine_features import sine_features


def encoded(
    x: Tensor, positions: Tensor | None, position_map: Rotation | SineMap | None, backend: str
) -> Tensor:
    """Return queries or keys with their position map applied, [B, T, H, R]."""
    if position_map is None:
        return x
    if isinstance(position_map, Rotation):
        return reference.rotate(x, positions, position_map)
    return sine_features(x, positions, position_map, backend=backend)
