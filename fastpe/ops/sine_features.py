"""The features of SPE and F-StrIPE."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.specs import SineMap
from .register import first_order, operator, plain, refuse_transforms

_SINE_INPUTS = (
    "Tensor x, Tensor positions, Tensor freq, Tensor? offset, Tensor gain, Tensor? gate, "
    "Tensor? noise, bool pool, bool group, str backend"
)


def _sine_features_fake(x, positions, freq, offset, gain, gate, z, pool, group, backend):
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return x.new_empty((*x.shape[:2], freq.shape[0], sines.feature_dim))


@operator(f"sine_features({_SINE_INPUTS}) -> Tensor", _sine_features_fake)
def _sine_features(*args):
    x, positions, freq, offset, gain, gate, z, pool, group, backend = args
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return backends.load(backend).sine_features(x, positions, sines, group)


def _sine_features_backward_fake(grad_y, x, positions, freq, offset, gain, gate, *rest):
    needs = rest[-1]
    inputs = (x, positions, freq, offset, gain, gate)
    return tuple(
        torch.empty_like(i, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for i, need in zip(inputs, needs, strict=True)
    )


@operator(
    f"sine_features_backward(Tensor grad_y, {_SINE_INPUTS}, bool[] needs) -> (Tensor dx, "
    "Tensor dpositions, Tensor dfreq, Tensor doffset, Tensor dgain, Tensor dgate)",
    _sine_features_backward_fake,
)
def _sine_features_backward(*args):
    grad_y, x, positions, freq, offset, gain, gate, z, pool, group, backend, needs = args
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return backends.load(backend).sine_features_backward(grad_y, x, positions, sines, group, needs)


class SineFeatures(torch.autograd.Function):
    """Features of SPE and F-StrIPE (`reference.sine_features`), without the codes."""

    @staticmethod
    def forward(ctx, x, positions, freq, offset, gain, gate, z, pool, group, backend):
        """Return the features, [B, T, H, R], H of freq; neighbours may share a head of x."""
        y = _sine_features(x, positions, freq, offset, gain, gate, z, pool, group, backend)
        ctx.save_for_backward(x, positions, freq, offset, gain, gate, z)
        ctx.options = pool, group, backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """Return the gradients of the tensors; the noise has none."""
        args = (grad_y, *ctx.saved_tensors, *ctx.options)
        grads = first_order(_sine_features_backward, args, ctx.needs_input_grad[:6])
        return *grads, None, None, None, None


def sine_features(
    x: Tensor, positions: Tensor, sines: SineMap, *, group: bool = True, backend: str
) -> Tensor:
    """Apply `SineFeatures`; without its bookkeeping where nothing is recorded.

    Args:
        group: Make codes once for equal positions; False is for measurements.
    """
    if plain((x, positions, *sines[:-1])):
        return backends.load(backend).sine_features(x, positions, sines, group)
    refuse_transforms()
    return SineFeatures.apply(x, positions, *sines, group, backend)
