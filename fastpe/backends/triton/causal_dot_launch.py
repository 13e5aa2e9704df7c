"""Launch the scan and its gradient: sizes, blocks, segments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..specs import ScanOptions, compute_dtype, state_heads
from ..tensors import SCAN, SCAN_BACKWARD, check_devices, contiguous, sum_groups, sum_to
from . import causal_dot as scan
from . import causal_dot_backward as scan_backward
from . import common
from . import elementwise as maps
from .blocks import Blocks, blocks
from .common import Card, Kernel, empty, kernel, numbers, power, rows

_FEATURE_MAPS = {
    "identity": (maps.identity, maps.identity_slope),
    "elu1": (maps.elu1, maps.elu1_slope),
    "relu": (maps.relu, maps.relu_slope),
    "exp": (maps.exp, maps.exp_slope),
}


def segments(programs: int, t: int, c: int, sequences: int, processors: int) -> tuple[int, int]:
    """Return the tokens of a segment and the number of segments that fill the card twice.

    A packed sequence gets the same bits as alone if its segments have the same length.

    Args:
        programs: Programs without segments.
        t: Tokens of a row.
        c: Tokens of a tile.
        sequences: Sequences of a row, whose lengths the host does not know. Each begins its own
            segment; the number returned is for a row of one sequence.
        processors: Multiprocessors of the card.
    """
    wanted = -(-2 * processors // max(programs, 1))
    # a segment pays off if its tokens cost more than its state
    wanted = min(wanted, max(t // (4 * c) + 1 - sequences, 1))
    length = -(-max(t, 1) // (wanted * c)) * c
    return length, -(-max(t, 1) // length)


class _Plan:
    """The constants of all calls with these sizes and options."""

    def __init__(
        self, shape: torch.Size, e: int, dtype: torch.dtype, freq: torch.Size | None,
        shared: tuple[int, int, int], sequences: int | None, options: ScanOptions, card: Card,
    ) -> None:  # fmt: skip
        self.card = card
        b, self.t, self.h, d = shape
        self.e, self.heads, self.dtype, self.chunk = e, b * self.h, dtype, options.chunk
        # heads of q that share a head of k, a head of v, a state
        self.of_k, self.of_v, self.of_state = (self.h // max(x, 1) for x in shared)
        # sequences of one row, and of all rows
        self.row = 1 if sequences is None else sequences
        self.sequences = b * self.row
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
            "RANGES": sequences is not None,
        }
        self.adjoints = {"SLOPE": slope, "ADJOINT": adjoint}
        self.sizes = self.t, self.h, d, e, w, self.levels, self.row
        self.kernels: dict[tuple, Kernel] = {}

    def blocks(self, role: str) -> Blocks:
        """Return the blocks of a role of the scan."""
        shared = self.card.shared
        return blocks(role, self.pairs, self.e, self.parts, self.dtype, shared, self.chunk)

    def roles_kv(self, want_k: bool, want_v: bool) -> tuple[str, ...]:
        """Return the kernels for dk and dv: one if the whole state fits a program."""
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
    """The tensors of a call or its gradient, in the layout that kernels take."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        check_devices(SCAN, inputs)
        q, k, v, s0, z0, positions, freq, ranges = inputs
        heads = q.shape[2], k.shape[2], v.shape[2]
        self.plan = _plan(
            *(q.shape, v.shape[-1], q.dtype, None if freq is None else freq.shape),
            (k.shape[2], v.shape[2], state_heads(*heads, 0 if freq is None else freq.shape[0])),
            None if ranges is None else ranges.shape[0],
            options,
            common.card(q.device),
        )
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.strides = *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]
        self.wide = compute_dtype(q)
        self.initial = contiguous(s0, self.wide), contiguous(z0, self.wide)
        self.packed, self.ranges = ranges is not None, contiguous(ranges, torch.int64)
        self.where, self.steps = (q, q), (0, 0)
        if freq is not None:
            self.where = contiguous(positions, torch.float64), contiguous(freq, torch.float64)
            self.steps = (
                0 if positions.shape[0] == 1 else self.plan.t * self.plan.levels,
                0 if freq.shape[0] == 1 else freq[0].numel(),
            )

    def by_token(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory for numbers of tokens, zeroed if some may belong to no sequence."""
        x = empty(self.q, *shape, dtype=dtype)
        return x.zero_() if self.packed else x

    def of_states(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return memory for s and z of all sequences, with this many heads."""
        plan = self.plan
        shape = plan.sequences, heads
        return (
            empty(self.q, *shape, plan.r, plan.e, dtype=self.wide),
            empty(self.q, *shape, plan.rz, dtype=self.wide),
        )

    def cut(self, role: str) -> tuple[int, tuple[int, int]]:
        """Return a role's blocks of columns, and (length, slots of a row) of its segments."""
        plan, block = self.plan, self.plan.blocks(role)
        columns = -(-plan.e // block.be)
        if role[:4] == "grad":
            columns *= -(-plan.pairs // block.bw)
        programs = plan.heads * columns
        length, count = segments(programs, plan.t, block.c, plan.row, plan.card.processors)
        return columns, (length, plan.row - 1 + count)

    def slots(self, cut: tuple[int, int]) -> Tensor:
        """Return the slots' six numbers, computed on the card, if sequences are ranges."""
        if not self.packed:
            return self.q
        slots = empty(self.q, cut[1], 6, dtype=torch.int64)
        kernel(scan.slots_kernel, ("num_warps", 1), ("num_stages", 1))(
            (cut[1], 1, 1), (self.ranges, slots), (self.plan.row, cut[0])
        )
        return slots

    def states(
        self, cut: tuple[int, int], slots: Tensor, x: Tensor, y: Tensor,
        groups: tuple[int, int, int], initial: tuple, den: Tensor, delta: Tensor, backwards: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], tuple[str, bool]]:  # fmt: skip
        """Return (s, z) at the start of each segment, their layout, and the constant STATE.

        The layout is: heads that share a state, strides of heads and slots, sizes of s and z.
        groups: Numbers of heads that share a head of x, of y and of the initial state.
        """
        plan, (s, z), group = self.plan, initial, groups[2]
        count, size = plan.r * plan.e, plan.r * plan.e + plan.rz
        if cut[1] == plan.row:
            given = s is not None
            s = self.q if s is None else s
            apart = group, 1, plan.h // group, count, plan.rz
            return (s, s if z is None else z), apart, ("STATE", given)
        states = empty(self.q, plan.heads, cut[1], size, dtype=self.wide)
        plan.kernel(scan.state_kernel, "state", ("BACKWARDS", backwards))(
            (-(-plan.e // plan.blocks("state").be) * cut[1] * plan.heads, 1, 1),
            (x, y, den, delta, states, *self.where, slots),
            (*plan.sizes, *groups[:2], *cut, *x.stride()[:3], *y.stride()[:3], *self.steps),
        )
        choices = ("STATE", s is not None), ("BACKWARDS", backwards), ("RANGES", self.packed)
        choices += ("ACC", plan.meta["ACC"]), ("BLOCK", 1024), ("num_warps", 4), ("num_stages", 1)
        kernel(scan.prefix_kernel, *choices)(
            (plan.sequences * plan.h, -(-size // 1024), 1),
            tuple(states if x is None else x for x in (states, s, z, self.ranges)),
            (plan.h, plan.row, *cut, group, count, plan.rz),
        )
        return (states, states[..., count:]), (1, cut[1], 1, size, size), ("STATE", True)


def causal_dot(
    *inputs: Tensor | ScanOptions | None, save: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, den [B, H, T] and the final s and z, see `fastpe.ops.causal_dot`."""
    *inputs, options = inputs
    call, (q, _, v, *_) = _Scan(inputs, options), inputs
    plan, (b, t, h, _) = call.plan, q.shape
    o = call.by_token(b, t, h, plan.e, dtype=v.dtype)
    den = call.by_token(b, h, t if plan.rz else 0, dtype=call.wide)
    s, z = call.of_states(h // plan.of_state)
    if not plan.sequences * h:
        return o, den, s, z
    groups = plan.of_k, plan.of_v, plan.of_state
    with torch.cuda.device_of(q):
        columns, cut = call.cut("forward")
        slots = call.slots(cut)
        state, apart, given = call.states(
            cut, slots, call.k, call.v, groups, call.initial, den, den, False
        )
        plan.kernel(scan.forward_kernel, "forward", given)(
            (columns * cut[1] * plan.heads, 1, 1),
            (call.q, call.k, call.v, o, den, *state, s, z, *call.where, slots),
            (*plan.sizes, *groups, *cut, *call.strides, *call.steps, *apart),
        )
    return o, den, s, z


def _final_gradients(
    call: _Scan, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of s and z for all heads: in a group that shares one, the first has it."""
    given, group = [contiguous(x, call.wide) for x in grads], call.plan.of_state
    missing = [x is None for x in given]
    if all(missing) or (group == 1 and not any(missing)):
        return tuple(given)
    spread = [x.zero_() for x in call.of_states(call.plan.h)]
    for x, of_first in zip(spread, given, strict=True):
        if of_first is not None:
            x[:, ::group] = of_first
    return tuple(spread)


def causal_dot_backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    options: ScanOptions,
    o: Tensor,
    den: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs; empty where not needed."""
    call, (q, k, v, _, _, positions, freq, _) = _Scan(inputs, options), inputs
    check_devices(SCAN_BACKWARD, (q, *grads, o, den))
    plan, none, (b, t, h, _) = call.plan, q.new_empty(0), q.shape
    if not plan.sequences * h:
        pairs = zip(inputs[:7], needs, strict=True)
        return tuple(torch.zeros_like(x) if need else none for x, need in pairs)

    def of_tokens(x: Tensor) -> Tensor:
        # one gradient per head of q; heads that share keys or values are summed below
        return call.by_token(b, t, h, x.shape[-1], dtype=x.dtype if x.shape[2] == h else call.wide)

    do, final = rows(grads[0]), _final_gradients(call, grads[1:])
    dq, dk, dv = map(of_tokens, (q, k, v))
    ds0, dz0 = call.of_states(h)
    turn, want_state = needs[5] or needs[6], needs[3] or needs[4]
    want_k, delta = needs[1] or turn or want_state, torch.empty_like(den)
    by_position, by_freq = [], []

    def gradients(columns: int, cut: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # parts of the gradients of positions and frequencies, one for each program
        if not turn:
            return q, q
        by_position.append(call.by_token(columns, b, h, t, plan.levels, dtype=call.wide))
        by_freq.append(empty(q, b, h, cut[1], *freq.shape[1:], dtype=call.wide))
        return by_position[-1], by_freq[-1]

    qkv, strides = (call.q, call.k, call.v), (*call.strides, *do.stride()[:3], *call.steps)
    turning, shared = (("TURN", turn), ("WANT_POSITIONS", needs[5])), (plan.of_k, plan.of_v)
    with torch.cuda.device_of(q):
        # this kernel also makes delta, which the gradients of keys need
        if needs[0] or turn or (want_k and plan.rz):
            columns, cut = call.cut("grad_q")
            slots, groups = call.slots(cut), (*shared, plan.of_state)
            state, apart, given = call.states(
                cut, slots, call.k, call.v, groups, call.initial, den, den, False
            )
            plan.kernel(scan_backward.grad_q_kernel, "grad_q", given, *turning)(
                (columns * cut[1] * plan.heads, 1, 1),
                (*qkv, o, do, den, delta, *state, dq, *call.where, slots, *gradients(columns, cut)),
                (*plan.sizes, *shared, *cut, *strides, *apart),
            )
        for role in plan.roles_kv(want_k, needs[2]):
            columns, cut = call.cut(role)
            slots = call.slots(cut)
            state, apart, given = call.states(
                cut, slots, call.q, do, (1, 1, 1), final, den, delta, True
            )
            of_k = role != "grad_v"
            turned = gradients(columns, cut) if of_k else (q, q)
            choices = turning if of_k else (("TURN", False), ("WANT_POSITIONS", False))
            choices += ("WANT_DK", of_k), ("WANT_DV", role != "grad_k")
            choices += (("WANT_STATE", want_state and of_k),)
            plan.kernel(scan_backward.grad_kv_kernel, role, given, *choices)(
                (columns * cut[1] * plan.heads, 1, 1),
                (*qkv, do, den, delta, *state, dk, dv, ds0, dz0, *call.where, slots, *turned),
                (*plan.sizes, *shared, *cut, *strides, *apart),
            )
    results = []
    for x, dim, heads, dtype, need in (
        (dq, 2, h, q.dtype, needs[0]),
        (dk, 2, k.shape[2], k.dtype, needs[1]),
        (dv, 2, v.shape[2], v.dtype, needs[2]),
        (ds0, 1, h // plan.of_state, call.wide, needs[3]),
        (dz0, 1, h // plan.of_state, call.wide, needs[4]),
    ):
        results.append(sum_groups(x, dim, heads, dtype) if need else none)
    for like, parts, need in ((positions, by_position, needs[5]), (freq, by_freq, needs[6])):
        # kernels leave out the factor 2 pi
        total = 2 * math.pi * sum(x.sum((0, 2), dtype=torch.float64) for x in parts)
        results.append(sum_to(total, like) if need else none)
    return tuple(results)
