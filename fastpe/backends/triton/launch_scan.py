"""Launches of the scan and of its gradient: sizes, blocks, segments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import ScanOptions, compute_dtype
from . import maps, scan, scan_backward
from .common import Numbers, converted, empty, power, rows, sum_to

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


def _level_block(levels: int) -> int:
    # the block for components of a position; one needs no product
    return 1 if levels <= 1 else power(levels)


class _Scan:
    """What the kernels of one call, or of its gradient, have in common."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        q, k, v, s0, z0, positions, freq = inputs
        self.q, self.k, self.v, self.options = rows(q), rows(k), rows(v), options
        self.wide = compute_dtype(q)
        self.initial = converted(s0, self.wide), converted(z0, self.wide)
        self.b, self.t, self.h, self.d = q.shape
        self.e, self.heads = v.shape[-1], self.b * self.h
        self.r, self.rz = options.widths(self.d)
        psi, self.slope = _FEATURE_MAPS[options.feature_map]
        pairs, encode, self.adjoint = "none", maps.unrotated, maps.unrotated_adjoint
        self.pairs, w, self.levels = self.d, 0, 0
        self.where, self.strides = (q, q), (0, 0)
        if freq is not None:
            f, w, self.levels = freq.shape
            self.where = converted(positions, torch.float64), converted(freq, torch.float64)
            by_batch = 0 if positions.shape[0] == 1 else self.t * self.levels
            self.strides = by_batch, 0 if f == 1 else w * self.levels
            encode, self.adjoint = maps.rotate, maps.rotate_adjoint
            if options.pool:
                encode, self.adjoint = maps.rotate_pool, maps.rotate_pool_adjoint
            pairs = "halves" if 2 * w == self.d else "scattered halves"
            pairs = "neighbours" if options.interleaved else pairs
            self.pairs = -(-self.d // 2)
        self.maps = {
            "SCALE": options.scale,
            "EPS": options.eps,
            "PSI": psi,
            "ENCODE": encode,
            "PAIRS": pairs,
            "PARTS": 2 if pairs != "none" and not options.pool else 1,
            "MAP_FIRST": options.map_first,
            "NORMALIZE": options.normalize,
        }
        numbers = Numbers.of(q.dtype)
        self.numbers = {"ACC": numbers.acc, "DOT": numbers.dot, "PRECISION": numbers.precision}
        self.sizes = self.t, self.h, self.d, self.e, w, self.levels

    def blocks(self, role: str) -> Blocks:
        parts = 1 if self.maps["PAIRS"] == "none" else 2
        return blocks(role, self.pairs, self.e, parts, self.q.dtype, self.options.chunk)

    def roles_kv(self, want_k: bool, want_v: bool) -> tuple[str, ...]:
        """Return the kernels that make dk and dv: one, if the whole state fits a program."""
        parts = 1 if self.maps["PAIRS"] == "none" else 2
        if want_k and want_v and max(power(self.pairs) * parts, power(self.e)) <= 64:
            return ("grad_kv",)
        return ("grad_k",) * want_k + ("grad_v",) * want_v

    def launch(
        self, kernel: Callable, programs: int, cut: tuple[int, int], block: Blocks,
        *args: object, **meta: object,
    ) -> None:  # fmt: skip
        """Run a kernel: its tensors, then the sizes, then its strides."""
        n = kernel.arg_names.index("T")
        meta |= self.numbers | {"C": block.c, "BW": block.bw, "BE": block.be}
        kernel[(programs,)](
            *args[:n], *self.sizes, *cut, *args[n:],
            **meta, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip

    def states(
        self, cut: tuple[int, int], x: Tensor, y: Tensor, initial: tuple, den: Tensor,
        delta: Tensor, backwards: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int], bool]:  # fmt: skip
        """Return (s, z) at the beginning of each segment, how far apart, and if there is any."""
        s, z = initial
        count, size = self.r * self.e, self.r * self.e + self.rz
        if cut[1] == 1:
            s = self.q if s is None else s
            return (s, s if z is None else z), (count, self.rz), initial[0] is not None
        states = empty(self.q, self.heads, cut[1], size, dtype=self.wide)
        block = self.blocks("state")
        programs = -(-self.e // block.be) * cut[1] * self.heads
        self.launch(
            scan.state_kernel, programs, cut, block,
            x, y, den, delta, states, *self.where,
            *x.stride()[:3], *y.stride()[:3], *self.strides,
            **self.maps, BACKWARDS=backwards,
        )  # fmt: skip
        scan.prefix_kernel[(self.heads, -(-size // 1024))](
            states, states if s is None else s, states if z is None else z, cut[1], count, self.rz,
            STATE=s is not None, BACKWARDS=backwards, BLOCK=1024, ACC=self.numbers["ACC"],
        )  # fmt: skip
        return (states, states[..., count:]), (size, size), True


def causal_dot(
    *inputs: Tensor | ScanOptions | None, save: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, den [B, H, T] and the final state (`ops.CausalDot`)."""
    *inputs, options = inputs
    call, (q, _, v, *_) = _Scan(inputs, options), inputs
    o = empty(q, *v.shape)
    den = empty(q, call.b, call.h, call.t if call.rz else 0, dtype=call.wide)
    s = empty(q, call.b, call.h, call.r, call.e, dtype=call.wide)
    z = empty(q, call.b, call.h, call.rz, dtype=call.wide)
    if not call.heads:
        return o, den, s, z
    block = call.blocks("forward")
    columns = -(-call.e // block.be)
    cut = segments(call.heads * columns, call.t, block.c, q.device)
    with torch.cuda.device_of(q):
        state, sizes, given = call.states(cut, call.k, call.v, call.initial, den, den, False)
        call.launch(
            scan.forward_kernel, columns * cut[1] * call.heads, cut, block,
            call.q, call.k, call.v, o, den, *state, s, z, *call.where,
            *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *call.strides, *sizes,
            **call.maps, STATE=given,
        )  # fmt: skip
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
    do, final = rows(grads[0]), (converted(grads[1], call.wide), converted(grads[2], call.wide))
    dq, dk, dv = (empty(x, *x.shape) for x in (q, k, v))
    ds0 = empty(q, call.b, call.h, call.r, call.e, dtype=call.wide)
    dz0 = empty(q, call.b, call.h, call.rz, dtype=call.wide)
    if final != (None, None):
        final = (
            torch.zeros_like(ds0) if final[0] is None else final[0],
            torch.zeros_like(dz0) if final[1] is None else final[1],
        )
    turn, want_state = needs[5] or needs[6], needs[3] or needs[4]
    want_k = needs[1] or turn or want_state
    delta = torch.empty_like(den)
    by_position, by_freq = [], []

    def gradients(role: str, columns: int, cut: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # of positions and frequencies, by each program: what to add up
        if not turn:
            return q, q
        shape = columns, call.b, call.h, call.t, call.levels
        by_position.append(empty(q, *shape, dtype=call.wide))
        by_freq.append(empty(q, call.b, call.h, cut[1], *freq.shape[1:], dtype=call.wide))
        return by_position[-1], by_freq[-1]

    strides = *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *do.stride()[:3]
    meta = call.maps | {"SLOPE": call.slope, "ADJOINT": call.adjoint, "TURN": turn}
    meta |= {"WANT_POSITIONS": needs[5], "BL": _level_block(call.levels)}
    with torch.cuda.device_of(q):
        # by the way it makes delta, which the gradients of the keys begin with
        if call.heads and (needs[0] or turn or (want_k and call.rz)):
            block = call.blocks("grad_q")
            columns = -(-call.pairs // block.bw)
            cut = segments(call.heads * columns, call.t, block.c, q.device)
            state, sizes, given = call.states(cut, call.k, call.v, call.initial, den, den, False)
            call.launch(
                scan_backward.grad_q_kernel, columns * cut[1] * call.heads, cut, block,
                call.q, call.k, call.v, o, do, den, delta, *state, dq, *call.where,
                *gradients("grad_q", columns, cut), *strides, *call.strides, *sizes,
                **meta, STATE=given,
            )  # fmt: skip
        for role in call.roles_kv(want_k, needs[2]) if call.heads else ():
            block = call.blocks(role)
            columns = -(-call.pairs // block.bw) * -(-call.e // block.be)
            cut = segments(call.heads * columns, call.t, block.c, q.device)
            state, sizes, given = call.states(cut, call.q, do, final, den, delta, True)
            of_k = role != "grad_v"
            call.launch(
                scan_backward.grad_kv_kernel, columns * cut[1] * call.heads, cut, block,
                call.q, call.k, call.v, do, den, delta, *state, dk, dv, ds0, dz0, *call.where,
                *(gradients(role, columns, cut) if of_k else (q, q)),
                *strides, *call.strides, *sizes,
                **(meta | {"TURN": turn and of_k}), STATE=given, WANT_STATE=want_state and of_k,
                WANT_DK=of_k, WANT_DV=role != "grad_k",
            )  # fmt: skip
    none = q.newempty(0)
    results = [x if need else none for x, need in zip((dq, dk, dv, ds0, dz0), needs, strict=False)]
    results += [none, none]
    if needs[5]:
        total = sum(x.sum((0, 2), dtype=torch.float64) for x in by_position)
        results[5] = sum_to(total, positions)
    if needs[6]:
        total = sum(x.sum((0, 2), dtype=torch.float64) for x in by_freq)
        results[6] = sum_to(total, freq)
    return tuple(results)
