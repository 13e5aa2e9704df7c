"""Launches of the scan and of its gradient: sizes, blocks, segments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import ScanOptions, compute_dtype
from ..tensors import contiguous, sum_to
from . import maps, scan, scan_backward
from .common import Kernel, empty, kernel, numbers, power, rows

_FEATURE_MAPS = {
    "identity": (maps.identity, maps.identity_slope),
    "elu1": (maps.elu1, maps.elu1_slope),
    "relu": (maps.relu, maps.relu_slope),
    "exp": (maps.exp, maps.exp_slope),
}


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a card has."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class Blocks(NamedTuple):
    """A launch: tokens C, pairs (or columns) BW and values BE of a tile; warps, loads ahead."""

    c: int
    bw: int
    be: int
    warps: int
    stages: int


# For 16 bits, by the widest block of a row and whether pairs rotate (2) or not (1): tokens of a
# tile, columns of the result that a program makes, warps. The largest that need no spills on sm_90
# (scripts/aot_check.py); where there is no entry, the last line of `blocks` holds.
_TILES = {
    "forward": {
        (64, 1): (64, 64, 4),
        (64, 2): (32, 64, 4),
        (128, 1): (32, 64, 8),
    },
    "grad_q": {
        (64, 1): (64, 64, 4),
        (64, 2): (32, 64, 8),
        (128, 1): (32, 64, 8),
        (128, 2): (32, 32, 8),
    },
    "grad_kv": {(64, 1): (32, 64, 4), (64, 2): (16, 64, 4)},
    "grad_k": {(128, 1): (32, 64, 8), (128, 2): (32, 32, 8)},
    "grad_v": {(128, 1): (32, 64, 8), (128, 2): (32, 64, 8)},
    "state": {
        (64, 1): (64, 64, 4),
        (64, 2): (64, 64, 4),
        (128, 1): (32, 64, 8),
        (128, 2): (32, 64, 8),
    },
}


@functools.cache
def blocks(role: str, width: int, e: int, parts: int, dtype: torch.dtype, chunk: int = 0) -> Blocks:
    """Return the launch of a kernel: a function of sizes and dtype, never of T.

    Args:
        role: A row of _TILES.
        width: Pairs of a query, or its components where nothing rotates.
        parts: 2 where pairs rotate, else 1.
        chunk: The caller's chunk size, 0 for the default.
    """
    bw, be = power(width), power(e)
    widest = max(bw * parts, be, 64)
    c, columns, warps = 16, 32, 8
    if dtype.itemsize == 2:
        c, columns, warps = _TILES[role].get((widest, parts), (c, columns, warps))
    if chunk:
        c = min(c, power(chunk))
    if role in ("grad_q", "grad_k"):
        bw = min(bw, max(columns // parts, 16))
    elif role != "grad_kv":
        be = min(be, columns)
    return Blocks(c, bw, be, warps, 2)


def segments(programs: int, t: int, c: int, device: torch.device) -> tuple[int, int]:
    """Return the tokens of a segment and the number of segments that fill the card twice."""
    wanted = -(-2 * processors(device) // max(programs, 1))
    # a segment pays for itself if its tokens outweigh its state
    wanted = min(wanted, max(t // (4 * c), 1))
    length = -(-max(t, 1) // (wanted * c)) * c
    return length, -(-max(t, 1) // length)


class _Plan:
    """What every call of these sizes and options has in common."""

    def __init__(
        self, shape: torch.Size, e: int, dtype: torch.dtype, freq: torch.Size | None,
        options: ScanOptions,
    ) -> None:  # fmt: skip
        b, self.t, h, d = shape
        self.e, self.heads, self.dtype, self.chunk = e, b * h, dtype, options.chunk
        self.r, self.rz = options.widths(d)
        psi, slope = _FEATURE_MAPS[options.feature_map]
        pairs, encode, adjoint = "none", maps.unrotated, maps.unrotated
        _, w, self.levels = freq or (0, 0, 0)
        self.pairs = d
        if freq is not None:
            encode, adjoint = maps.rotate, maps.rotate_adjoint
            if options.pool:
                encode, adjoint = maps.rotate_pool, maps.rotate_pool_adjoint
            pairs = "halves" if 2 * w == d else "scattered halves"
            pairs = "neighbours" if options.interleaved else pairs
            self.pairs = -(-d // 2)
        self.parts = 1 if pairs == "none" else 2
        self.meta = {
            **numbers(dtype),
            "SCALE": options.scale,
            "EPS": options.eps,
            "PSI": psi,
            "ENCODE": encode,
            "PAIRS": pairs,
            "PARTS": 1 if options.pool else self.parts,
            "MAP_FIRST": options.map_first,
            "NORMALIZE": options.normalize,
        }
        self.adjoints = {"SLOPE": slope, "ADJOINT": adjoint}
        self.sizes = self.t, h, d, e, w, self.levels
        self.kernels: dict[tuple, Kernel] = {}

    def blocks(self, role: str) -> Blocks:
        """Return the launch of a role of the scan."""
        return blocks(role, self.pairs, self.e, self.parts, self.dtype, self.chunk)

    def roles_kv(self, want_k: bool, want_v: bool) -> tuple[str, ...]:
        """Return the kernels that make dk and dv: one, if the whole state fits a program."""
        if want_k and want_v and max(power(self.pairs) * self.parts, power(self.e)) <= 64:
            return ("grad_kv",)
        return ("grad_k",) * want_k + ("grad_v",) * want_v

    def kernel(self, function: Callable, role: str, *choices: tuple[str, object]) -> Kernel:
        """Return a kernel with all its constants."""
        key = role, *choices
        if key not in self.kernels:
            block = self.blocks(role)
            meta = self.meta | dict(choices) | {"C": block.c, "BW": block.bw, "BE": block.be}
            if "ADJOINT" in function.arg_names:
                meta |= self.adjoints | {"BL": 1 if self.levels <= 1 else power(self.levels)}
            self.kernels[key] = Kernel(
                function, meta | {"num_warps": block.warps, "num_stages": block.stages}
            )
        return self.kernels[key]


_plan = functools.lru_cache(maxsize=1024)(_Plan)


class _Scan:
    """The tensors of one call, or of its gradient, as the kernels take them."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        q, k, v, s0, z0, positions, freq = inputs
        shape = None if freq is None else freq.shape
        self.plan = _plan(q.shape, v.shape[-1], q.dtype, shape, options)
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.strides = *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]
        self.wide = compute_dtype(q)
        self.initial = contiguous(s0, self.wide), contiguous(z0, self.wide)
        self.where, self.steps = (q, q), (0, 0)
        if freq is not None:
            self.where = contiguous(positions, torch.float64), contiguous(freq, torch.float64)
            self.steps = (
                0 if positions.shape[0] == 1 else self.plan.t * self.plan.levels,
                0 if freq.shape[0] == 1 else freq[0].numel(),
            )

    def cut(self, role: str) -> tuple[int, tuple[int, int]]:
        """Return the blocks of columns of a role, and the length and number of segments."""
        plan, block = self.plan, self.plan.blocks(role)
        columns = -(-plan.e // block.be)
        if role[:4] == "grad":
            columns *= -(-plan.pairs // block.bw)
        return columns, segments(plan.heads * columns, plan.t, block.c, self.q.device)

    def states(
        self, cut: tuple[int, int], x: Tensor, y: Tensor, initial: tuple, den: Tensor,
        delta: Tensor, backwards: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int], tuple[str, bool]]:  # fmt: skip
        """Return (s, z) at the beginning of each segment, how far apart, and if there is any."""
        plan, (s, z) = self.plan, initial
        count, size = plan.r * plan.e, plan.r * plan.e + plan.rz
        if cut[1] == 1:
            given = s is not None
            s = self.q if s is None else s
            return (s, s if z is None else z), (count, plan.rz), ("STATE", given)
        states = empty(self.q, plan.heads, cut[1], size, dtype=self.wide)
        plan.kernel(scan.state_kernel, "state", ("BACKWARDS", backwards))(
            (-(-plan.e // plan.blocks("state").be) * cut[1] * plan.heads, 1, 1),
            (x, y, den, delta, states, *self.where),
            (*plan.sizes, *cut, *x.stride()[:3], *y.stride()[:3], *self.steps),
        )
        choices = ("STATE", s is not None), ("BACKWARDS", backwards), ("ACC", plan.meta["ACC"])
        choices += ("BLOCK", 1024), ("num_warps", 4), ("num_stages", 1)
        kernel(scan.prefix_kernel, *choices)(
            (plan.heads, -(-size // 1024), 1),
            (states, states if s is None else s, states if z is None else z),
            (cut[1], count, plan.rz),
        )
        return (states, states[..., count:]), (size, size), ("STATE", True)


def causal_dot(
    *inputs: Tensor | ScanOptions | None, save: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, den [B, H, T] and the final state (`ops.CausalDot`)."""
    *inputs, options = inputs
    call, (q, _, v, *_) = _Scan(inputs, options), inputs
    plan, (b, t, h, _) = call.plan, q.shape
    o = empty(q, *v.shape)
    den = empty(q, b, h, t if plan.rz else 0, dtype=call.wide)
    s = empty(q, b, h, plan.r, plan.e, dtype=call.wide)
    z = empty(q, b, h, plan.rz, dtype=call.wide)
    if not plan.heads:
        return o, den, s, z
    with torch.cuda.device_of(q):
        columns, cut = call.cut("forward")
        state, sizes, given = call.states(cut, call.k, call.v, call.initial, den, den, False)
        plan.kernel(scan.forward_kernel, "forward", given)(
            (columns * cut[1] * plan.heads, 1, 1),
            (call.q, call.k, call.v, o, den, *state, s, z, *call.where),
            (*plan.sizes, *cut, *call.strides, *call.steps, *sizes),
        )
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
    call, (q, k, v, _, _, positions, freq) = _Scan(inputs, options), inputs
    plan, none, (b, t, h, _) = call.plan, q.new_empty(0), q.shape
    if not plan.heads:
        pairs = zip(inputs, needs, strict=True)
        return tuple(torch.zeros_like(x) if need else none for x, need in pairs)
    do, final = rows(grads[0]), (contiguous(grads[1], call.wide), contiguous(grads[2], call.wide))
    dq, dk, dv = (empty(x, *x.shape) for x in (q, k, v))
    ds0 = empty(q, b, h, plan.r, plan.e, dtype=call.wide)
    dz0 = empty(q, b, h, plan.rz, dtype=call.wide)
    if final != (None, None):
        final = (
            torch.zeros_like(ds0) if final[0] is None else final[0],
            torch.zeros_like(dz0) if final[1] is None else final[1],
        )
    turn, want_state = needs[5] or needs[6], needs[3] or needs[4]
    want_k, delta = needs[1] or turn or want_state, torch.empty_like(den)
    by_position, by_freq = [], []

    def gradients(columns: int, cut: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # of positions and frequencies, by each program: what to add up
        if not turn:
            return q, q
        by_position.append(empty(q, columns, b, h, t, plan.levels, dtype=call.wide))
        by_freq.append(empty(q, b, h, cut[1], *freq.shape[1:], dtype=call.wide))
        return by_position[-1], by_freq[-1]

    qkv, strides = (call.q, call.k, call.v), (*call.strides, *do.stride()[:3], *call.steps)
    turning = ("TURN", turn), ("WANT_POSITIONS", needs[5])
    with torch.cuda.device_of(q):
        # by the way it makes delta, which the gradients of the keys begin with
        if needs[0] or turn or (want_k and plan.rz):
            columns, cut = call.cut("grad_q")
            state, sizes, given = call.states(cut, call.k, call.v, call.initial, den, den, False)
            plan.kernel(scan_backward.grad_q_kernel, "grad_q", given, *turning)(
                (columns * cut[1] * plan.heads, 1, 1),
                (*qkv, o, do, den, delta, *state, dq, *call.where, *gradients(columns, cut)),
                (*plan.sizes, *cut, *strides, *sizes),
            )
        for role in plan.roles_kv(want_k, needs[2]):
            columns, cut = call.cut(role)
            state, sizes, given = call.states(cut, call.q, do, final, den, delta, True)
            of_k = role != "grad_v"
            turned = gradients(columns, cut) if of_k else (q, q)
            choices = turning if of_k else (("TURN", False), ("WANT_POSITIONS", False))
            choices += ("WANT_DK", of_k), ("WANT_DV", role != "grad_k")
            choices += (("WANT_STATE", want_state and of_k),)
            plan.kernel(scan_backward.grad_kv_kernel, role, given, *choices)(
                (columns * cut[1] * plan.heads, 1, 1),
                (*qkv, do, den, delta, *state, dk, dv, ds0, dz0, *call.where, *turned),
                (*plan.sizes, *cut, *strides, *sizes),
            )
    results = [x if need else none for x, need in zip((dq, dk, dv, ds0, dz0), needs, strict=False)]
    for like, parts, need in ((positions, by_position, needs[5]), (freq, by_freq, needs[6])):
        # by the angles in turns so far
        total = 2 * math.pi * sum(x.sum((0, 2), dtype=torch.float64) for x in parts)
        results.append(sum_to(total, like) if need else none)
    return tuple(results)
