"""What the parts of one call share: the setting, and the sums that pass between them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ..backends.specs import Band, Rotation, SineMap
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import FeatureMap


class Sums(NamedTuple):
    """Sums over tokens, as `LinearAttentionState` has them."""

    s: Tensor
    z: Tensor
    c: Tensor | None = None
    lost: Tensor | None = None


class Setting(NamedTuple):
    """How to attend: the arguments that calls with a common state have in common.

    Attributes:
        route: The module of this folder that attends: linear, favor or banded.
        maps: The encoding's position maps of queries and keys; None if it overrides `features`.
    """

    encoding: PositionalEncoding | None
    feature_map: str | FeatureMap
    normalize: bool | str
    eps: float
    chunk_size: int | None
    backend: str
    route: ModuleType
    maps: tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | tuple[Band, Band] | None = None


def per_head(encoding: PositionalEncoding | None, feature_map: str | FeatureMap) -> bool:
    """Return whether each head makes features of keys in its own way, and needs its own state."""
    if isinstance(feature_map, FeatureMap) and feature_map.per_head_state:
        return True
    return encoding is not None and encoding.per_head


def config(
    encoding: PositionalEncoding | None, feature_map: str | FeatureMap, normalize: bool | str
) -> str:
    """Return the configuration that a state belongs to, as text."""
    name = "no encoding" if encoding is None else encoding.signature
    psi = feature_map.signature if isinstance(feature_map, FeatureMap) else repr(feature_map)
    return f"{name}, feature_map={psi}, normalize={normalize!r}"


def noise_in_use(
    encoding: PositionalEncoding | None, feature_map: str | FeatureMap
) -> Tensor | None:
    """Return the noise key that a state made now belongs to."""
    noise = None if encoding is None else encoding.noise_key
    return feature_map.state_noise(noise) if isinstance(feature_map, FeatureMap) else noise
