"""The scan and its gradient by the native libraries, on either device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..specs import ScanOptions, compute_dtype, state_heads
from ..tensors import SCAN, SCAN_BACKWARD, check_devices, contiguous, sum_groups, sum_to
from . import library
from .library import (
    CUDA,
    DTYPES,
    CausalDot,
    StridedTensor,
    call,
    empty,
    libraries,
    pointer,
    strided,
    thread_count,
)

_FEATURE_MAPS = {"identity": 0, "elu1": 1, "relu": 2, "exp": 3}
_NORMALIZE = {"none": 0, "sum": 1, "abs": 2}


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return x.shape, x.stride(), x.dtype


def _without_data(layout: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> StridedTensor:
    return StridedTensor(None, layout[1], DTYPES[layout[2]])


@functools.lru_cache(maxsize=1024)
def _scan_arguments(
    q: tuple, k: tuple, v: tuple, freq: tuple, bp: int, counts: tuple, options: ScanOptions
) -> bytes:
    """Return the arguments but for data, threads and code path: the same for every step.

    counts: of sequences and of the heads of states.
    """
    sequences, states = counts
    args = CausalDot(*q[0], v[0][-1], sequences, k[0][2], v[0][2], states)
    args.chunk = min(options.chunk, 2**30)
    args.feature_map = _FEATURE_MAPS[options.feature_map]
    args.normalize, args.eps = _NORMALIZE[options.normalize], options.eps
    args.interleaved, args.pool = options.interleaved, options.pool
    args.map_first, args.scale = options.map_first, options.scale
    args.q, args.k, args.v = _without_data(q), _without_data(k), _without_data(v)
    args.Hf, args.W, args.L, args.Bp = *freq, bp
    return bytes(args)


class Scan:
    """Arguments common to the scan and its gradient; holds on to the tensors behind them."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        check_devices(SCAN, inputs)
        q, k, v, s0, z0, positions, freq, ranges = inputs
        self.inputs = q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
        self.dtype, self.device = compute_dtype(q), q.device
        self.positions = contiguous(positions, torch.float64)
        self.freq = contiguous(freq, torch.float64)
        self.s0, self.z0 = contiguous(s0, self.dtype), contiguous(z0, self.dtype)
        self.ranges = contiguous(ranges, torch.int64)
        rotation = ((0, 0, 0), 0) if freq is None else (freq.shape, positions.shape[0])
        sequences = q.shape[0] if ranges is None else ranges.shape[0]
        self.counts = sequences, state_heads(q, k, v, freq)
        fixed = _scan_arguments(_layout(q), _layout(k), _layout(v), *rotation, self.counts, options)
        self.args = args = CausalDot.from_buffer_copy(fixed)
        args.threads, args.isa = thread_count(q.shape[1]), library.isa
        args.q.data, args.k.data, args.v.data = q.data_ptr(), k.data_ptr(), v.data_ptr()
        args.s0, args.z0 = pointer(self.s0), pointer(self.z0)
        args.freq, args.positions = pointer(self.freq), pointer(self.positions)
        args.ranges = pointer(self.ranges)

    def empty(self, *shape: int) -> Tensor:
        """Return memory for what is in the dtype of arithmetic."""
        return empty(*shape, dtype=self.dtype, device=self.device)

    def by_token(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory for numbers of every token: zeros where some may be of no sequence."""
        x = empty(*shape, dtype=dtype, device=self.device)
        return x if self.ranges is None else x.zero_()

    def outputs(self, widths: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for o, s and z, which the arguments then point to."""
        (q, _, v), args, (r, rz) = self.inputs, self.args, widths
        (b, t, h, _), e = q.shape, v.shape[-1]
        o = self.by_token(b, t, h, e, dtype=v.dtype)
        s, z = self.empty(*self.counts, r, e), self.empty(*self.counts, rz)
        args.o, args.s, args.z = strided(o), pointer(s), pointer(z)
        return o, s, z


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
    b, t, h, d = q.shape
    widths = options.widths(d)
    o, s, z = scan.outputs(widths)
    den = scan.by_token(b, h, t if widths[1] else 0, dtype=scan.dtype) if save else None
    scan.args.den = pointer(den)
    call("causal_dot", q.device, scan.args)
    return o, den, s, z


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
    grad_s, grad_z = (contiguous(x, scan.dtype) for x in grads[1:])
    b, t, h, _ = q.shape
    args, wide = scan.args, torch.float64

    def none() -> Tensor:
        return q.new_empty(0)

    def of_tokens(x: Tensor) -> Tensor:
        # of each head of q: those that share keys or values are added behind
        alone = x.shape[2] == h
        return scan.by_token(b, t, h, x.shape[-1], dtype=x.dtype if alone else scan.dtype)

    def of_states(x: Tensor) -> Tensor:
        return scan.empty(scan.counts[0], h, *x.shape[2:])

    dq, dk, dv = (
        of_tokens(x) if need else none() for x, need in zip((q, k, v), needs, strict=False)
    )
    ds0 = of_states(s0) if needs[3] else none()
    dz0 = of_states(z0) if needs[4] else none()
    dpositions = scan.by_token(b, h, t, args.L, dtype=wide) if needs[5] else none()
    dfreq = none()
    if needs[6]:
        dfreq = empty(scan.counts[0], h, args.W, args.L, dtype=wide, device=q.device)
    args.o, args.den, args.grad_o = strided(o), pointer(den), strided(grad_o)
    args.grad_s, args.grad_z = pointer(grad_s), pointer(grad_z)
    for name, x in (("grad_q", dq), ("grad_k", dk), ("grad_v", dv)):
        if x.numel():
            setattr(args, name, strided(x))
    args.grad_s0, args.grad_z0 = pointer(ds0), pointer(dz0)
    args.grad_freq, args.grad_positions = pointer(dfreq), pointer(dpositions)
    scratch = scan.empty(2, *den.shape) if libraries[q.device.type].on_gpu else None
    args.scratch = pointer(scratch)
    call("causal_dot_backward", q.device, args)
    if needs[5]:
        dpositions = sum_to(dpositions.sum(1), positions)
    if needs[6]:
        dfreq = sum_to(dfreq.sum(0), freq)
    if needs[1]:
        dk = sum_groups(dk, 2, k.shape[2], k.dtype)
    if needs[2]:
        dv = sum_groups(dv, 2, v.shape[2], v.dtype)
    if needs[3]:
        ds0 = sum_groups(ds0, 1, scan.counts[1], ds0.dtype)
    if needs[4]:
        dz0 = sum_groups(dz0, 1, scan.counts[1], dz0.dtype)
    return dq, dk, dv, ds0, dz0, dpositions, dfreq


@functools.lru_cache(maxsize=1024)
def shared_memory(dtype: torch.dtype, widths: tuple[int, int, int]) -> int:
    """Return the bytes of shared memory that blocks of the CUDA kernels need for D, R and E."""
    d, r, e = widths
    args = CausalDot(B=2**10, T=2**10, H=1, D=max(d, r), E=e, S=2**10, normalize=1)
    if r <= d:  # a rotation needs most
        args.freq, args.W, args.L, args.map_first, args.pool = 1, (d + 1) // 2, 1, 1, r < d
    args.q.dtype = DTYPES[dtype]
    return CUDA.functions.fastpe_cuda_shared_memory(ctypes.byref(args))
