"""Launch the sine features, their gradient, and the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from ..specs import SineMap, compute_dtype
from ..tensors import SINES, check_devices, contiguous, sum_groups, sum_to
from . import noise
from . import sine_features as features
from .common import empty, kernel, numbers, power, rows

# rows of a tile; each tile reads all noise, so as many as fit without spills (scripts/aot_check.py)
_ROWS = {torch.bfloat16: 128, torch.float16: 32}
_ROWS_BACKWARD = {torch.bfloat16: 64, torch.float16: 64}


class _Sines:
    """The tensors and constants of sine features and of their gradient."""

    def __init__(
        self, x: Tensor, positions: Tensor, sines: SineMap, rows_of_tile: dict[torch.dtype, int]
    ) -> None:
        check_devices(SINES, (x, positions, *sines[:5]))
        self.x = rows(x)
        self.b, self.t, heads, self.d = x.shape
        self.h = sines.gain.shape[0]
        self.k, self.levels, self.r = sines.gain.shape[-1], positions.shape[-1], sines.feature_dim
        self.wide = compute_dtype(x)
        double = [contiguous(i, torch.float64) for i in (positions, *sines[:4])]
        # bfloat16 noise halves the bytes that every tile reads
        narrow = torch.bfloat16 if x.dtype == torch.bfloat16 else self.wide
        tables = *double, contiguous(sines.noise, narrow)
        self.tables = [x if i is None else i for i in tables]
        # last: heads of features that share a head of x
        self.sizes = (
            *(self.b, self.t, self.h, self.d, self.k, sines.rows, self.r, self.levels),
            self.h // max(heads, 1),
        )
        shared = positions.shape[0] == 1
        self.by_batch = 0 if shared else self.t * self.levels
        # a tile has tokens of one sequence, or of several that share positions and so sines
        self.rows = rows_of_tile.get(x.dtype, 32)
        together = min(triton.next_power_of_2(max(self.b, 1)), 4) if shared else 1
        tokens = self.rows // together
        self.tiles = -(-self.b // together) * -(-self.t // tokens)
        self.meta = {
            **numbers(x.dtype),
            "MIX": "noise" if sines.noise is not None else "pool" if sines.pool else "keep",
            "OFFSET": sines.offset is not None,
            "GATE": sines.gate is not None,
            "BB": together,
            "BN": tokens,
            "BD": min(power(self.d), self.rows, 64),
            "num_warps": 8,
            "num_stages": 2,
        }

    def launch(self, function: Callable, columns: int, *args: object, **meta: object) -> None:
        """Launch a kernel on all tiles; args are its own tensors, then its own strides."""
        grid = self.tiles, self.h, columns
        if not math.prod(grid):
            return
        n = function.arg_names.index("B") - len(self.tables)
        with torch.cuda.device_of(self.x):
            kernel(function, *self.meta.items(), *meta.items())(
                grid,
                (*args[:n], *self.tables),
                (*self.sizes, *self.x.stride()[:3], *args[n:], self.by_batch),
            )


def sine_features(x: Tensor, positions: Tensor, sines: SineMap, group: bool) -> Tensor:
    """Return the features of SPE or F-StrIPE, see `fastpe.ops.sine_features`."""
    call = _Sines(x, positions, sines, _ROWS)
    y = empty(x, call.b, call.t, call.h, call.r)
    keep = call.meta["MIX"] == "keep"
    br = 16 if keep else min(power(call.r), 128)
    columns = 1 if keep else -(-call.r // br)
    call.launch(features.features_kernel, columns, call.x, y, BR=br)
    return y


def sine_features_backward(
    grad_y: Tensor,
    x: Tensor,
    positions: Tensor,
    sines: SineMap,
    group: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, positions, freq, offset, gain, gate; empty if not needed."""
    check_devices(("x", "grad_y"), (x, grad_y))
    call, dy = _Sines(x, positions, sines, _ROWS_BACKWARD), rows(grad_y)
    none, parameters, levels, wide = x.new_empty(0), any(needs[2:]), call.levels, call.wide
    # one gradient per head of features; heads that share a head of x are summed below
    dtype = x.dtype if x.shape[2] == call.h else wide
    dx = empty(x, call.b, call.t, call.h, call.d, dtype=dtype)
    by_position, partial, by_gate = dx, dx, dx
    if needs[1]:
        by_position = empty(x, call.b, call.h, call.t, levels, dtype=wide)
    if parameters:
        partial = empty(x, call.tiles, call.h, call.k, 2 + levels, call.d, dtype=wide)
        by_gate = empty(x, call.tiles, call.h, call.d, dtype=wide)
    call.launch(
        features.features_backward_kernel, 1,
        call.x, dy, dx, by_position, partial, by_gate, *dy.stride()[:3],
        WANT_X=needs[0], WANT_POSITIONS=needs[1], WANT_PARAMETERS=parameters,
        BR=min(power(call.r), call.rows), BL=power(levels),
    )  # fmt: skip
    grads = [sum_groups(dx, 2, x.shape[2], x.dtype) if needs[0] else none] + [none] * 5
    if needs[1]:
        grads[1] = sum_to(2 * math.pi * by_position.sum(1, dtype=torch.float64), positions)
    if parameters:
        total = partial.sum(0, dtype=torch.float64).movedim(-1, 1)  # [H, D, K, 2 + L]
        # for phases in cycles, with the factor gain
        slope = 2 * math.pi * sines.gain.double()
        found = {2: slope[..., None] * total[..., 2:], 3: slope * total[..., 1], 4: total[..., 0]}
        if sines.gate is not None:
            found[5] = by_gate.sum(0, dtype=torch.float64)
        tensors = {2: sines.freq, 3: sines.offset, 4: sines.gain, 5: sines.gate}
        for i, grad in found.items():
            if needs[i]:
                grads[i] = grad.to(tensors[i].dtype)
    return tuple(grads)


def philox_normal(
    seed: Tensor,
    step: Tensor,
    module: int,
    kind: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """Return standard normal numbers [HD, J, R], as the reference does, without synchronising."""
    check_devices(("seed", "step"), (seed, step))
    out = empty(seed, *shape, dtype=dtype)
    if out.numel():
        hd, j, r = shape
        with torch.cuda.device_of(seed):
            constants = ("BLOCK", 64), ("num_warps", 4), ("num_stages", 1)
            grid = hd * j, -(-r // 256), 1
            # the signed number with the same 32 bits
            first = (first + 2**31) % 2**32 - 2**31
            sizes = module << 3 | kind, first, j, r
            kernel(noise.normal_kernel, *constants)(grid, (out, seed, step), sizes)
    return out
