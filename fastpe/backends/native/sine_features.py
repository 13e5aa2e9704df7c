"""The features of SPE and F-StrIPE and their gradient by the native libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..specs import SineMap, compute_dtype
from ..tensors import SINES, check_devices, contiguous, sum_groups, sum_to
from . import library
from .library import SineFeatures, call, empty, libraries, pointer, strided, thread_count

# of the tokens, that blocks of a CUDA kernel share out, whatever the card
_SLICES = 64


class Sines:
    """Arguments common to the features and their gradient; holds on to the tensors behind them."""

    def __init__(self, x: Tensor, positions: Tensor, sines: SineMap, group: bool) -> None:
        check_devices(SINES, (x, positions, *sines[:5]))
        b, t, hx, d = x.shape
        self.x = x = x.resolve_neg()
        self.shape = b, t, sines.gain.shape[0]
        wide = torch.float64
        self.tensors = (
            contiguous(positions, wide),
            contiguous(sines.freq, wide),
            contiguous(sines.offset, wide),
            contiguous(sines.gain, wide),
            contiguous(sines.gate, wide),
            contiguous(sines.noise, compute_dtype(x)),
        )
        self.args = SineFeatures(
            *(*self.shape, d, sines.gain.shape[-1], sines.rows, sines.feature_dim),
            *(positions.shape[-1], positions.shape[0], hx),
            *(thread_count(t), library.isa, sines.pool, group),
            *map(pointer, self.tensors),
            strided(x),
        )

    def output(self) -> Tensor:
        """Return memory for the features, which the arguments then point to."""
        y = empty(*self.shape, self.args.R, dtype=self.x.dtype, device=self.x.device)
        self.args.y = strided(y)
        return y


def sine_features(x: Tensor, positions: Tensor, sines: SineMap, group: bool) -> Tensor:
    """Return the features of SPE or F-StrIPE (`ops.SineFeatures`)."""
    made = Sines(x, positions, sines, group)
    y = made.output()
    call("sine_features", x.device, made.args)
    return y


def sine_features_backward(
    grad_y: Tensor,
    x: Tensor,
    positions: Tensor,
    sines: SineMap,
    group: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, positions, freq, offset, gain, gate; empty where not needed."""
    check_devices(("x", "grad_y"), (x, grad_y))
    made, grad_y = Sines(x, positions, sines, group), grad_y.resolve_neg()
    b, t, h = made.shape
    wide = {"dtype": torch.float64, "device": x.device}
    dx = x.new_empty(0)
    if needs[0]:
        # of each head of features: those that share a head of x are added behind
        dtype = x.dtype if x.shape[2] == h else compute_dtype(x)
        dx = empty(*made.shape, x.shape[-1], dtype=dtype, device=x.device)
    dpositions = x.new_empty(0)
    if needs[1]:
        dpositions = empty(b, h, t, positions.shape[-1], **wide)
    made.args.grad_y = strided(grad_y)
    if needs[0]:
        made.args.grad_x = strided(dx)
    made.args.grad_positions = pointer(dpositions)
    names, grads = ("freq", "offset", "gain", "gate"), []
    for name, need in zip(names, needs[2:], strict=True):
        grads.append(x.new_empty(0))
        if need:
            grads[-1] = empty(*getattr(sines, name).shape, **wide).zero_()
            setattr(made.args, f"grad_{name}", pointer(grads[-1]))
    scratch = None
    if libraries[x.device.type].on_gpu:
        # shares of the tokens, each for a block of threads, whatever the card
        made.args.slices = slices = min(_SLICES, -(-b * t // 16))
        if any(needs[2:]):
            dk = sines.gain[0].numel()
            size = dk * (2 + made.args.L) + made.args.D
            scratch = empty(slices, h, size, **wide)
            made.args.scratch = pointer(scratch)
    call("sine_features_backward", x.device, made.args)
    if needs[0]:
        dx = sum_groups(dx, 2, x.shape[2], x.dtype)
    if needs[1]:
        dpositions = sum_to(dpositions.sum(1), positions)
    grads = [
        grad.to(getattr(sines, name).dtype) if need else grad
        for grad, name, need in zip(grads, names, needs[2:], strict=True)
    ]
    return dx, dpositions, *grads
