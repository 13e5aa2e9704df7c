"""The features of SPE and F-StrIPE."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.specs import SineMap
from .register import differentiable, direct


class SineOptions(NamedTuple):
    """The arguments of the operator that are no tensors."""

    pool: bool
    group: bool
    backend: str


def _sines(tensors, options):
    return SineMap(*tensors[2:], options.pool)


def _fake(tensors, options):
    x, sines = tensors[0], _sines(tensors, options)
    return x.new_empty((*x.shape[:2], sines.freq.shape[0], sines.feature_dim))


def _forward(tensors, options):
    backend = backends.load(options.backend)
    return backend.sine_features(*tensors[:2], _sines(tensors, options), options.group)


def _backward(grads, tensors, options, saved, needs):
    sines, backend = _sines(tensors, options), backends.load(options.backend)
    return backend.sine_features_backward(*grads, *tensors[:2], sines, options.group, needs)


#: Features of SPE and F-StrIPE (`reference.sine_features`), without the codes: [B, T, H, R], H of
#: freq; neighbours may share a head of x. The noise has no gradient.
SineFeatures = differentiable(
    "sine_features",
    tensors="x positions freq offset? gain gate? noise?",
    options=SineOptions,
    outputs="y",
    learned="x positions freq offset gain gate",
    fake=_fake,
    forward=_forward,
    backward=_backward,
)


def sine_features(
    x: Tensor, positions: Tensor, sines: SineMap, *, group: bool = True, backend: str
) -> Tensor:
    """Apply `SineFeatures`, without its bookkeeping if nothing is recorded.

    Args:
        x: Queries or keys, [B, T, Hx, D].
        positions: [B or 1, T, L], float64.
        sines: Sines of the position that multiply each component.
        group: Make codes once for equal positions; False is for measurements.
        backend: Name of a backend.
    """
    tensors = x, positions, *sines[:-1]
    if backend in backends.IN_PYTORCH:
        return reference.sine_features(x, positions, sines)
    if direct(tensors):
        return backends.load(backend).sine_features(x, positions, sines, group)
    return SineFeatures.apply(*tensors, SineOptions(sines.pool, group, backend))
