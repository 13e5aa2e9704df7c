"""Features of queries or keys, by encoding and feature map."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import backends
from .._checks import shape
from .._torch import observed
from ..backends import reference
from ..backends.specs import Rotation, SineMap, compute_dtype
from ..backends.tensors import blank
from ..feature_maps.base import FeatureMap
from ..ops.position_map import encoded
from .call import Setting
from .packing import Packing


def features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the features of queries or keys for the numerator and for the normaliser.

    Both are in the dtype of arithmetic: [B, T, H, R] and [B, T, H or Hk, Rz]. Keys of Hk heads keep
    them unless each head makes features in its own way.

    Args:
        x: Queries or keys, [B, T, H or Hk, D].
        positions: [B or 1, T, L], or None without an encoding.
        side: "q" or "k".
        setting: How to attend.
    """
    psi = setting.feature_map
    if setting.backend in backends.IN_PYTORCH or isinstance(psi, FeatureMap):
        x = x.to(compute_dtype(x))
    x, position_map = apply_custom(x, positions, side, setting)
    if isinstance(psi, FeatureMap):
        x = encoded(x, positions, position_map, setting.backend)
        if psi.num_heads is not None:
            x = reference.spread(x, psi.num_heads)
        x = _checked(psi(x), x, psi.feature_dim(x.shape[-1]), "feature_map")
        return x, x
    if isinstance(position_map, SineMap):
        x, position_map = encoded(x, positions, position_map, setting.backend), None
    return reference.features(x.to(compute_dtype(x)), positions, position_map, psi)


def before_scan(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting, packing: Packing
) -> Tensor:
    """Return queries or keys encoded before the scan, which takes them as they are; 0 at padding.

    On the CPU the tokens of a call decide how their sines are rounded. So packed sequences are
    encoded one by one there: each gets the bits that it has alone.
    """

    def make(x: Tensor, positions: Tensor | None) -> Tensor:
        if isinstance(setting.feature_map, FeatureMap):
            return features(x, positions, side, setting)[0]
        x, position_map = apply_custom(x, positions, side, setting)
        return encoded(x, positions, position_map, setting.backend)

    x, bounds = blank(x, packing.padding), packing.cu_seqlens
    if bounds is None or x.device.type != "cpu" or observed() or len(bounds) <= 2:
        return make(x, positions)
    lengths = bounds.diff().tolist()
    at = itertools.repeat(None) if positions is None else positions.split(lengths, 1)
    return torch.cat([make(*each) for each in zip(x.split(lengths, 1), at, strict=False)], 1)


def apply_custom(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Rotation | SineMap | None]:
    """Return x and its position map, or None.

    An encoding that overrides `features` has no map: this applies it, and checks the result.
    """
    encoding, maps = setting.encoding, setting.maps
    if encoding is None or maps is not None:
        return x, None if maps is None else maps["qk".index(side)]
    if encoding.per_head and encoding.num_heads is not None:
        x = reference.spread(x, encoding.num_heads)
    y = encoding.features(x, positions, side)
    return _checked(y, x, encoding.feature_dim, "pos_encoding.features"), None


def _checked(y: Tensor, x: Tensor, width: int, name: str) -> Tensor:
    wanted = (*x.shape[:-1], width)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        raise ValueError(f"{name} must return {wanted} on {x.device}, got {shape(y)}")
    return y.to(x.dtype)
