"""What the parts of one call have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.specs import Band, Rotation, SineMap, compute_dtype
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import FeatureMap
from ..feature_maps.favor import Favor


class Setting(NamedTuple):
    """How to attend: what calls that share a state have in common, and by what."""

    encoding: PositionalEncoding | None
    feature_map: str | FeatureMap
    normalize: bool | str
    eps: float
    chunk_size: int | None
    backend: str
    maps: tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | tuple[Band, Band] | None = None

    def prepared(self, device: torch.device) -> Setting:
        """Return the same with the encoding's maps of queries and keys, made once for a call."""
        if self.encoding is None:
            return self
        return self._replace(maps=self.encoding.position_maps(device))

    @property
    def per_head(self) -> bool:
        """Whether heads make features of keys in ways of their own."""
        psi = self.feature_map
        if isinstance(psi, FeatureMap) and (isinstance(psi, Favor) or psi.num_heads is not None):
            return True
        return self.encoding is not None and self.encoding.per_head


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


def feature_widths(
    q: Tensor,
    encoding: PositionalEncoding | None,
    feature_map: str | FeatureMap,
    normalize: bool | str,
) -> tuple[int, int]:
    """Return R and Rz, the features of the numerator and of the normaliser, of a state."""
    d = q.shape[-1]
    if isinstance(feature_map, FeatureMap):
        r = feature_map.feature_dim(d if encoding is None else encoding.feature_dim)
        return r, r if normalize else 0
    return (d, d if normalize else 0) if encoding is None else encoding.state_widths(normalize)


def kernel_dtype(q: Tensor, feature_map: str | FeatureMap) -> torch.dtype:
    """Return the dtype that a kernel is to take: maps that are modules work in arithmetic's."""
    return compute_dtype(q) if isinstance(feature_map, FeatureMap) else q.dtype


def kernel_widths(
    q: Tensor, v: Tensor, encoding: PositionalEncoding | None, feature_map: str | FeatureMap
) -> tuple[int, int, int]:
    """Return the largest D, R and E that a kernel is to take."""
    d, e = q.shape[-1], v.shape[-1]
    if encoding is not None and encoding.banded:
        # the part of the gate, which adds up weights as one more value
        return d, d, e + 1
    r = d if encoding is None else encoding.feature_dim
    if not isinstance(feature_map, FeatureMap):
        return d, r, e
    # the scan takes what comes out of the map; what goes in is made too, unless Favor projects
    # exact sines
    exact = encoding is not None and encoding.exact
    made = 0 if exact and isinstance(feature_map, Favor) else r
    r = feature_map.feature_dim(r)
    return max(d, r, made), r, e
