"""The features of SPE and F-StrIPE and their gradient by the native libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..specs import SineMap, compute_dtype
from ..tensors import SINES, check_devices, sum_groups, sum_to
from . import library
from .library import SineFeatures, call, libraries, on_one_device, point, strided, thread_count

# parts of the tokens that blocks of a CUDA kernel share out, the same on every card
_SLICES = 64


class Sines:
    """Arguments common to the features and their gradient; holds on to the tensors behind them."""

    def __init__(self, x: Tensor, positions: Tensor, sines: SineMap, group: bool) -> None:
        on_one_device(SINES, (x, positions, *sines[:5]))
        b, t, hx, d = x.shape
        freq, offset, gain, gate, noise, pool = sines
        h, k, wide = gain.shape[0], gain.shape[-1], torch.float64
        self.x = x = x.resolve_neg()
        rows = 2 * k + (gate is not None)
        r = noise.shape[-1] if noise is not None else rows if pool else rows * d
        self.args = args = SineFeatures(
            *(b, t, h, d, k, rows, r, positions.shape[-1], positions.shape[0], hx),
            *(thread_count(t), library.isa, pool, group),
        )
        self.held = point(
            args,
            positions=(positions, wide),
            freq=(freq, wide),
            offset=(offset, wide),
            gain=(gain, wide),
            gate=(gate, wide),
            noise=(noise, wide if x.dtype == wide else torch.float32),
        )
        args.x = strided(x)
        self.shape = b, t, h

    def output(self) -> Tensor:
        """Return memory for the features, which the arguments then point to."""
        y = torch.empty((*self.shape, self.args.R), dtype=self.x.dtype, device=self.x.device)
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
        # one gradient for each head of features; sum_groups adds those that share a head of x
        dtype = x.dtype if x.shape[2] == h else compute_dtype(x)
        dx = torch.empty((*made.shape, x.shape[-1]), dtype=dtype, device=x.device)
    dpositions = x.new_empty(0)
    if needs[1]:
        dpositions = torch.empty((b, h, t, positions.shape[-1]), **wide)
    made.args.grad_y = strided(grad_y)
    if needs[0]:
        made.args.grad_x = strided(dx)
    made.args.grad_positions = dpositions.data_ptr()
    names, grads = ("freq", "offset", "gain", "gate"), []
    for name, need in zip(names, needs[2:], strict=True):
        grads.append(x.new_empty(0))
        if need:
            grads[-1] = torch.zeros(getattr(sines, name).shape, **wide)
            setattr(made.args, f"grad_{name}", grads[-1].data_ptr())
    scratch = None
    if libraries[x.device.type].on_gpu:
        # shares of the tokens, each for a block of threads, whatever the card
        made.args.slices = slices = min(_SLICES, -(-b * t // 16))
        if any(needs[2:]):
            dk = sines.gain[0].numel()
            size = dk * (2 + made.args.L) + made.args.D
            scratch = torch.empty((slices, h, size), **wide)
            made.args.scratch = scratch.data_ptr()
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
