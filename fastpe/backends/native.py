"""Backend "cpu", and what "cuda" has in common with it: calls of the libraries of csrc/."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..maps import Rotation, SineMap
from ..ops import ScanOptions, compute_dtype, state_heads
from . import forks
from .library import (
    CPU,
    CUDA,
    DTYPES,
    CausalDot,
    Library,
    PhaseFeatures,
    PhiloxNormal,
    StridedTensor,
    call,
    empty,
    libraries,
    strided,
)
from .tensors import SCAN, SCAN_BACKWARD, SINES, check_devices, contiguous, sum_groups, sum_to

__all__ = ["CPU", "CUDA", "ISAS", "Library", "libraries"]

ISAS = ("best", "portable", "avx2", "avx512")
# the code path to run, an index into ISAS; tests try each
isa = 0

_FEATURE_MAPS = {"identity": 0, "elu1": 1, "relu": 2, "exp": 3}
_NORMALIZE = {"none": 0, "sum": 1, "abs": 2}
# of the tokens, that blocks of a CUDA kernel share out, whatever the card
_SLICES = 64
# bytes of sines in shared memory, beside which every card has room for the rest of a step
_STEP_ROOM = 64 << 10


def unavailable(device: torch.device) -> str | None:
    """Return why the library cannot be used, or None, whatever the device."""
    return CPU.unavailable()


def unsupported(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str | None:
    """Return why tensors on a device cannot be taken, or None; dtypes and widths all can."""
    return None if device.type == "cpu" else f"needs tensors on the CPU, got {device}"


def describe() -> str:
    """Return the code path and threading in use."""
    openmp = "OpenMP" if CPU.functions.fastpe_openmp() else "one thread, built without OpenMP"
    return f"{ISAS[CPU.functions.fastpe_best_isa()]}, {openmp}"


def _threads(rows: int) -> int:
    """Return how many threads to run; a forked process starts them anew, not for one row."""
    return 1 if rows == 1 and forks.forked else torch.get_num_threads()


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return x.shape, x.stride(), x.dtype


def _without_data(layout: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> StridedTensor:
    return StridedTensor(None, layout[1], DTYPES[layout[2]])


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None or not x.numel() else x.data_ptr()


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


class _Scan:
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
        args.threads, args.isa = _threads(q.shape[1]), isa
        args.q.data, args.k.data, args.v.data = q.data_ptr(), k.data_ptr(), v.data_ptr()
        args.s0, args.z0 = _pointer(self.s0), _pointer(self.z0)
        args.freq, args.positions = _pointer(self.freq), _pointer(self.positions)
        args.ranges = _pointer(self.ranges)

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
        args.o, args.s, args.z = strided(o), _pointer(s), _pointer(z)
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
    scan = _Scan((q, k, v, s0, z0, positions, freq, ranges), options)
    b, t, h, d = q.shape
    widths = options.widths(d)
    o, s, z = scan.outputs(widths)
    den = scan.by_token(b, h, t if widths[1] else 0, dtype=scan.dtype) if save else None
    scan.args.den = _pointer(den)
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
    scan, (q, k, v, s0, z0, positions, freq, _) = _Scan(inputs, options), inputs
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
    args.o, args.den, args.grad_o = strided(o), _pointer(den), strided(grad_o)
    args.grad_s, args.grad_z = _pointer(grad_s), _pointer(grad_z)
    for name, x in (("grad_q", dq), ("grad_k", dk), ("grad_v", dv)):
        if x.numel():
            setattr(args, name, strided(x))
    args.grad_s0, args.grad_z0 = _pointer(ds0), _pointer(dz0)
    args.grad_freq, args.grad_positions = _pointer(dfreq), _pointer(dpositions)
    scratch = scan.empty(2, *den.shape) if libraries[q.device.type].on_gpu else None
    args.scratch = _pointer(scratch)
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


class _Sines:
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
        self.args = PhaseFeatures(
            *(*self.shape, d, sines.gain.shape[-1], sines.rows, sines.feature_dim),
            *(positions.shape[-1], positions.shape[0], hx),
            *(_threads(t), isa, sines.pool, group),
            *map(_pointer, self.tensors),
            strided(x),
        )

    def output(self) -> Tensor:
        """Return memory for the features, which the arguments then point to."""
        y = empty(*self.shape, self.args.R, dtype=self.x.dtype, device=self.x.device)
        self.args.y = strided(y)
        return y


def phase_features(x: Tensor, positions: Tensor, sines: SineMap, group: bool) -> Tensor:
    """Return the features of SPE or F-StrIPE (`ops.PhaseFeatures`)."""
    made = _Sines(x, positions, sines, group)
    y = made.output()
    call("phase_features", x.device, made.args)
    return y


def phase_features_backward(
    grad_y: Tensor,
    x: Tensor,
    positions: Tensor,
    sines: SineMap,
    group: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, positions, freq, offset, gain, gate; empty where not needed."""
    check_devices(("x", "grad_y"), (x, grad_y))
    made, grad_y = _Sines(x, positions, sines, group), grad_y.resolve_neg()
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
    made.args.grad_positions = _pointer(dpositions)
    names, grads = ("freq", "offset", "gain", "gate"), []
    for name, need in zip(names, needs[2:], strict=True):
        grads.append(x.new_empty(0))
        if need:
            grads[-1] = empty(*getattr(sines, name).shape, **wide).zero_()
            setattr(made.args, f"grad_{name}", _pointer(grads[-1]))
    scratch = None
    if libraries[x.device.type].on_gpu:
        # shares of the tokens, each for a block of threads, whatever the card
        made.args.slices = slices = min(_SLICES, -(-b * t // 16))
        if any(needs[2:]):
            dk = sines.gain[0].numel()
            size = dk * (2 + made.args.L) + made.args.D
            scratch = empty(slices, h, size, **wide)
            made.args.scratch = _pointer(scratch)
    call("phase_features_backward", x.device, made.args)
    if needs[0]:
        dx = sum_groups(dx, 2, x.shape[2], x.dtype)
    if needs[1]:
        dpositions = sum_to(dpositions.sum(1), positions)
    grads = [
        grad.to(getattr(sines, name).dtype) if need else grad
        for grad, name, need in zip(grads, names, needs[2:], strict=True)
    ]
    return dx, dpositions, *grads


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s0: Tensor,
    z0: Tensor,
    positions: Tensor | None,
    maps: tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | None,
    options: ScanOptions,
    lost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return o, s, z and lost of one token, T = 1, after a state: encoding and scan in one call.

    None where a CUDA block has no room for the sines.

    Args:
        lost: What float32 rounded off s0 and z0, [S, Hs, R E + Rz]; default nothing.
    """
    sines, where, device = [], (None, None), q.device
    if maps is not None and isinstance(maps[0], SineMap):
        room = q.shape[-1] * maps[0].rows * compute_dtype(q).itemsize * 2
        if libraries[device.type].on_gpu and room > _STEP_ROOM:
            return None
        pairs = zip((q, k), maps, strict=True)
        sines = [_Sines(x, positions, each, False) for x, each in pairs]
        q, k = (each.output() for each in sines)
    elif maps is not None:
        where = positions, maps[0].freq
    scan = _Scan((q, k, v, s0, z0, *where, None), options)
    r, rz = widths = options.widths(q.shape[-1])
    o, s, z = scan.outputs(widths)
    kept = None
    if scan.dtype == torch.float32:
        kept = scan.empty(*scan.counts, r * v.shape[-1] + rz)
        lost = torch.zeros_like(kept) if lost is None else contiguous(lost, scan.dtype)
        scan.args.lost0, scan.args.lost = _pointer(lost), _pointer(kept)
    for_q, for_k = (each.args for each in sines) if sines else (None, None)
    call("step", device, scan.args, for_q, for_k)
    return o, s, z, kept


@functools.lru_cache(maxsize=1024)
def shared_memory(dtype: torch.dtype, widths: tuple[int, int, int]) -> int:
    """Return the bytes of shared memory that blocks of the CUDA kernels need for D, R and E."""
    d, r, e = widths
    args = CausalDot(B=2**10, T=2**10, H=1, D=max(d, r), E=e, S=2**10, normalize=1)
    if r <= d:  # a rotation needs most
        args.freq, args.W, args.L, args.map_first, args.pool = 1, (d + 1) // 2, 1, 1, r < d
    args.q.dtype = DTYPES[dtype]
    return CUDA.functions.fastpe_cuda_shared_memory(ctypes.byref(args))


def philox_normal(
    seed: Tensor,
    step: Tensor,
    module: int,
    kind: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """Return standard normal numbers [HD, J, R] (`noise.philox_normal`)."""
    check_devices(("seed", "step"), (seed, step))
    out = empty(*shape, dtype=dtype, device=torch.device("cpu"))
    hd, rows, r = shape
    args = PhiloxNormal(
        seed=int(seed) & (2**64 - 1),
        step=int(step) & (2**32 - 1),
        first=first & (2**32 - 1),
        module=module,
        kind=kind,
        threads=_threads(hd * rows),
        isa=isa,
        dtype=DTYPES[dtype],
        hd=hd,
        rows=rows,
        r=r,
        out=_pointer(out),
    )
    CPU.call("philox_normal", args)
    return out
