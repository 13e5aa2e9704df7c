"""Features of queries and keys, by encoding and feature map."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import shape
from ..backends import reference
from ..backends.specs import Rotation, SineMap, compute_dtype
from ..feature_maps.base import FeatureMap
from ..ops.position_map import encoded
from ..ops.register import observed
from .call import Setting
from .packing import Packing, blank


def features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the features of queries or keys ("q", "k") for numerator and normaliser.

    [B, T, H, R] in the dtype of arithmetic, and [B, T, H or Hk, Rz]; keys of Hk heads keep them
    unless each head makes features in its own way.
    """
    psi = setting.feature_map
    if setting.backend == "reference" or isinstance(psi, FeatureMap):
        x = x.to(compute_dtype(x))
    x, position_map = _custom(x, positions, side, setting)
    if isinstance(psi, FeatureMap):
        x = _mapped(psi, encoded(x, positions, position_map, setting.backend))
        return x, x
    if isinstance(position_map, SineMap):
        x, position_map = encoded(x, positions, position_map, setting.backend), None
    return reference.features(x.to(compute_dtype(x)), positions, position_map, psi)


def log_features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the logarithms of Favor's features in two parts, see `Favor.exponents`."""
    x, position_map = _custom(x, positions, side, setting)
    return setting.feature_map.exponents(x, positions, position_map, setting.backend)


def before_map(x: Tensor, positions: Tensor | None, side: str, setting: Setting) -> Tensor:
    """Return queries or keys encoded in x's dtype, before the feature map, for the kernels."""
    x, position_map = _custom(x, positions, side, setting)
    return encoded(x, positions, position_map, setting.backend)


def by_sequence(
    make: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    positions: Tensor | None,
    packing: Packing,
) -> Tensor:
    """Return features of x, made as if each sequence was alone, to the last bit.

    On the CPU the tokens of a call decide how their sines are rounded, by what they share of them.

    Args:
        make: Returns the features of tokens from these and their positions.
        x: [B, T, H, D].
        positions: [B or 1, T, L] or None.
        packing: Which tokens are of which sequence; padding becomes zeros.
    """
    x, bounds = blank(x, packing.padding), packing.cu_seqlens
    if bounds is None or x.device.type != "cpu" or observed() or len(bounds) <= 2:
        return make(x, positions)
    lengths = bounds.diff().tolist()
    at = itertools.repeat(None) if positions is None else positions.split(lengths, 1)
    return torch.cat([make(*each) for each in zip(x.split(lengths, 1), at, strict=False)], 1)


def _custom(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Rotation | SineMap | None]:
    """Return x and the map that is still to be applied; an encoding without one is."""
    encoding, maps = setting.encoding, setting.maps
    if encoding is not None and encoding.banded:
        raise ValueError(
            "pos_encoding must have features here, to attend both ways or to other tokens, got "
            f"{encoding.signature}"
        )
    if encoding is None or maps is not None:
        return x, None if maps is None else maps["qk".index(side)]
    # features of an encoding that is not ours: what the kernels rely on is checked
    if encoding.per_head and encoding.num_heads is not None:
        x = reference.spread(x, encoding.num_heads)
    y = encoding.features(x, positions, side)
    return _checked(y, x, encoding.feature_dim, "pos_encoding.features"), None


def _mapped(feature_map: FeatureMap, x: Tensor) -> Tensor:
    # features of a map that may not be ours
    if feature_map.num_heads is not None:
        x = reference.spread(x, feature_map.num_heads)
    return _checked(feature_map(x), x, feature_map.feature_dim(x.shape[-1]), "feature_map")


def _checked(y: Tensor, x: Tensor, width: int, name: str) -> Tensor:
    wanted = (*x.shape[:-1], width)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        raise ValueError(f"{name} must return {wanted} on {x.device}, got {shape(y)}")
    return y.to(x.dtype)
