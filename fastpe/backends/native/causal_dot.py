"""The scan and its gradient by the native libraries, on either device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import Structure
from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import ScanOptions, state_heads
from ..tensors import SCAN, SCAN_BACKWARD, check_devices, sum_groups, sum_to
from . import library
from .library import (
    DTYPES,
    CausalDot,
    StridedTensor,
    call,
    libraries,
    on_one_device,
    point,
    strided,
    thread_count,
)

_FEATURE_MAPS = {"identity": 0, "elu1": 1, "relu": 2, "exp": 3}
_NORMALIZE = {"none": 0, "sum": 1, "abs": 2}


class _Fixed(NamedTuple):
    """The part of a call that sizes, strides and options determine: the same at every step."""

    struct: bytes  # without data, threads and code path
    dtype: torch.dtype  # of arithmetic and states
    widths: tuple[int, int]  # R and Rz
    states: int  # heads of states


@functools.lru_cache(maxsize=1024)
def _fixed(
    layouts: tuple[tuple, ...],
    dtypes: tuple[torch.dtype, ...],
    rotation: tuple[int, ...],
    sequences: int,
    options: ScanOptions,
) -> _Fixed:
    """Return the fixed part of a scan.

    Args:
        layouts: Shapes of q, k and v, then their strides.
        dtypes: Dtypes of q, k and v.
        rotation: Shape of freq, and the rows of positions; zeros without.
        sequences: S.
        options: How features and weights are made.
    """
    q, k, v, *strides = layouts
    heads = state_heads(q[2], k[2], v[2], rotation[0])
    args = CausalDot(*q, v[-1], sequences, k[2], v[2], heads)
    args.chunk = min(options.chunk, 2**30)
    args.feature_map = _FEATURE_MAPS[options.feature_map]
    args.normalize, args.eps = _NORMALIZE[options.normalize], options.eps
    args.interleaved, args.pool = options.interleaved, options.pool
    args.map_first, args.scale = options.map_first, options.scale
    args.Hf, args.W, args.L, args.Bp = rotation
    for name, stride, dtype in zip("qkv", strides, dtypes, strict=True):
        setattr(args, name, StridedTensor(None, stride, DTYPES[dtype]))
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    return _Fixed(bytes(args), wide, options.widths(q[-1]), heads)


class Scan:
    """Arguments common to the scan and its gradient; holds on to the tensors behind them."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        q, k, v, s0, z0, positions, freq, ranges = inputs
        on_one_device(SCAN, inputs)
        self.inputs = q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
        layouts = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()
        rotation = (0, 0, 0, 0) if freq is None else (*freq.shape, positions.shape[0])
        self.sequences = q.shape[0] if ranges is None else ranges.shape[0]
        fixed = _fixed(layouts, (q.dtype, k.dtype, v.dtype), rotation, self.sequences, options)
        struct, self.dtype, self.widths, self.states = fixed
        self.args = args = CausalDot.from_buffer_copy(struct)
        args.threads, args.isa = thread_count(q.shape[1]), library.isa
        args.q.data, args.k.data, args.v.data = q.data_ptr(), k.data_ptr(), v.data_ptr()
        self.held = point(
            args,
            s0=(s0, self.dtype),
            z0=(z0, self.dtype),
            positions=(positions, torch.float64),
            freq=(freq, torch.float64),
            ranges=(ranges, torch.int64),
        )
        self.ranged = ranges is not None

    def by_token(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory for numbers of every token: zeros where some may be of no sequence."""
        x = torch.empty(shape, dtype=dtype, device=self.inputs[0].device)
        return x.zero_() if self.ranged else x

    def run(self, name: str, save: bool, *more: Structure | None) -> tuple[Tensor | None, ...]:
        """Call a function that makes o, s and z, and den if it is to be saved; return these."""
        (q, _, v), args, (r, rz) = self.inputs, self.args, self.widths
        (b, t, h, _), e = q.shape, v.shape[-1]
        o, device = self.by_token(b, t, h, e, dtype=v.dtype), q.device
        s = torch.empty((self.sequences, self.states, r, e), dtype=self.dtype, device=device)
        z = torch.empty((self.sequences, self.states, rz), dtype=self.dtype, device=device)
        den = self.by_token(b, h, t if rz else 0, dtype=self.dtype) if save else None
        args.o = strided(o)
        # an empty tensor has no data, which is NULL
        args.s, args.z = s.data_ptr(), z.data_ptr()
        args.den = None if den is None else den.data_ptr()
        call(name, device, args, *more)
        return o, den, s, z


def causal_dot(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s0: Tensor | None,
    z0: Tensor | None,
    positions: Tensor | None,
    freq: Tensor | None,
    ranges: Tensor | None,
    options: ScanOptions,
    *,
    save: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return o, den [B, H, T] (None unless to be saved) and the final state (`ops.CausalDot`)."""
    scan = Scan((q, k, v, s0, z0, positions, freq, ranges), options)
    return scan.run("causal_dot", save)


def causal_dot_backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    options: ScanOptions,
    o: Tensor,
    den: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs; empty where not needed."""
    scan, (q, k, v, s0, z0, positions, freq, _) = Scan(inputs, options), inputs
    check_devices(SCAN_BACKWARD, (q, *grads, o, den))
    grad_o = grads[0].resolve_neg()
    b, t, h, _ = q.shape
    args, wide, device = scan.args, torch.float64, q.device

    def none() -> Tensor:
        return q.new_empty(0)

    def of_tokens(x: Tensor) -> Tensor:
        # one gradient for each head of q; sum_groups adds those that share keys or values
        alone = x.shape[2] == h
        return scan.by_token(b, t, h, x.shape[-1], dtype=x.dtype if alone else scan.dtype)

    def of_states(x: Tensor) -> Tensor:
        return torch.empty((scan.sequences, h, *x.shape[2:]), dtype=scan.dtype, device=device)

    dq, dk, dv = (
        of_tokens(x) if need else none() for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    ds0 = of_states(s0) if needs[3] else none()
    dz0 = of_states(z0) if needs[4] else none()
    dpositions = scan.by_token(b, h, t, args.L, dtype=wide) if needs[5] else none()
    dfreq = none()
    if needs[6]:
        dfreq = torch.empty((scan.sequences, h, args.W, args.L), dtype=wide, device=device)
    args.o, args.den, args.grad_o = strided(o), den.data_ptr(), strided(grad_o)
    held = point(args, grad_s=(grads[1], scan.dtype), grad_z=(grads[2], scan.dtype))
    for name, x in (("grad_q", dq), ("grad_k", dk), ("grad_v", dv)):
        if x.numel():
            setattr(args, name, strided(x))
    args.grad_s0, args.grad_z0 = ds0.data_ptr(), dz0.data_ptr()
    args.grad_freq, args.grad_positions = dfreq.data_ptr(), dpositions.data_ptr()
    if libraries[device.type].on_gpu:
        held.append(torch.empty((2, *den.shape), dtype=scan.dtype, device=device))
        args.scratch = held[-1].data_ptr()
    call("causal_dot_backward", device, args)
    if needs[5]:
        dpositions = sum_to(dpositions.sum(1), positions)
    if needs[6]:
        dfreq = sum_to(dfreq.sum(0), freq)
    if needs[1]:
        dk = sum_groups(dk, 2, k.shape[2], k.dtype)
    if needs[2]:
        dv = sum_groups(dv, 2, v.shape[2], v.dtype)
    if needs[3]:
        ds0 = sum_groups(ds0, 1, scan.states, ds0.dtype)
    if needs[4]:
        dz0 = sum_groups(dz0, 1, scan.states, dz0.dtype)
    return dq, dk, dv, ds0, dz0, dpositions, dfreq


@functools.lru_cache(maxsize=1024)
def shared_memory(dtype: torch.dtype, widths: tuple[int, int, int]) -> int:
    """Return the bytes of shared memory that blocks of the CUDA kernels need for D, R and E."""
    d, r, e = widths
    args = CausalDot(B=2**10, T=2**10, H=1, D=max(d, r), E=e, S=2**10, normalize=1)
    if r <= d:  # a rotation needs most
        args.freq, args.W, args.L, args.map_first, args.pool = 1, (d + 1) // 2, 1, 1, r < d
    args.q.dtype = DTYPES[dtype]
    return library.CUDA.functions.fastpe_cuda_shared_memory(ctypes.byref(args))
