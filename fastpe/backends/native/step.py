"""One token after a state in one call of a native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import Rotation, ScanOptions, SineMap, compute_dtype
from ..tensors import contiguous
from .causal_dot import Scan
from .library import call, libraries, pointer
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
        sines = [Sines(x, positions, each, False) for x, each in pairs]
        q, k = (each.output() for each in sines)
    elif maps is not None:
        where = positions, maps[0].freq
    scan = Scan((q, k, v, s0, z0, *where, None), options)
    r, rz = widths = options.widths(q.shape[-1])
    o, s, z = scan.outputs(widths)
    kept = None
    if scan.dtype == torch.float32:
        kept = scan.empty(*scan.counts, r * v.shape[-1] + rz)
        lost = torch.zeros_like(kept) if lost is None else contiguous(lost, scan.dtype)
        scan.args.lost0, scan.args.lost = pointer(lost), pointer(kept)
    for_q, for_k = (each.args for each in sines) if sines else (None, None)
    call("step", device, scan.args, for_q, for_k)
    return o, s, z, kept
