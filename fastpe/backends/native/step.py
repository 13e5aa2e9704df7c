"""One token after a state in one call of a native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import Rotation, ScanOptions, SineMap, compute_dtype
from .causal_dot import Scan
from .library import libraries, point
from .sine_features import Sines

# bytes of sines in shared memory, beside which every card has room for the rest of a step
_STEP_ROOM = 64 << 10


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

    None if a CUDA block has no room for the sines.

    Args:
        lost: The part of s0 and z0 that float32 rounded off, [S, Hs, R E + Rz]; default nothing.
    """
    sines, where = (None, None), (None, None)
    if maps is not None and isinstance(maps[0], SineMap):
        room = q.shape[-1] * maps[0].rows * compute_dtype(q).itemsize * 2
        if libraries[q.device.type].on_gpu and room > _STEP_ROOM:
            return None
        made = Sines(q, positions, maps[0], False), Sines(k, positions, maps[1], False)
        q, k, sines = made[0].output(), made[1].output(), (made[0].args, made[1].args)
    elif maps is not None:
        where = positions, maps[0].freq
    scan = Scan((q, k, v, s0, z0, *where, None), options)
    kept = None
    if scan.dtype == torch.float32:
        numbers = scan.widths[0] * v.shape[-1] + scan.widths[1]
        size = scan.sequences, scan.states, numbers
        kept = torch.empty(size, dtype=scan.dtype, device=q.device)
        lost = torch.zeros_like(kept) if lost is None else lost
        scan.held += point(scan.args, lost0=(lost, scan.dtype), lost=(kept, scan.dtype))
    o, _, s, z = scan.run("step", False, *sines)
    return o, s, z, kept
