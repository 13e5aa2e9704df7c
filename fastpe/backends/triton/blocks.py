"""The tiles of the scan's kernels, from sizes, dtype and card."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import common
from .common import power


class Blocks(NamedTuple):
    """Tokens C, pairs (or columns) BW and values BE of a tile; warps; stages of loads."""

    c: int
    bw: int
    be: int
    warps: int
    stages: int


# For 16 bits. Keys: widest block of a row, and 2 if pairs rotate, else 1. Values: tokens of a tile,
# columns of the result for one program, warps. These are the largest with almost no spills on sm_90
# (scripts/aot_check.py); `blocks` has defaults. float16 operands are twice as large
# (`common.numbers`).
_TILES = {
    torch.bfloat16: {
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
    },
    torch.float16: {
        "forward": {
            (64, 1): (32, 64, 4),
            (64, 2): (32, 64, 4),
            (128, 1): (16, 64, 8),
        },
        "grad_q": {
            (64, 1): (32, 64, 4),
            (64, 2): (16, 64, 4),
            (128, 1): (16, 64, 8),
            (128, 2): (16, 64, 8),
        },
        "grad_kv": {(64, 1): (16, 64, 4), (64, 2): (16, 64, 4)},
        "grad_k": {(128, 1): (32, 64, 8), (128, 2): (16, 64, 8)},
        "grad_v": {(128, 1): (32, 64, 8), (128, 2): (16, 64, 8)},
        "state": {
            (64, 1): (64, 64, 4),
            (64, 2): (32, 64, 4),
            (128, 1): (32, 64, 8),
            (128, 2): (32, 64, 8),
        },
    },
}

# most bytes of shared memory of a program with two stages and with one, by the widest block of a
# row; other rows fit every card (scripts/aot_check.py)
_SHARED = {
    torch.float32: {256: (133184, 98304)},
    torch.float64: {128: (103040, 69632), 256: (234624, 167936)},
}


@functools.cache
def blocks(
    role: str, width: int, e: int, parts: int, dtype: torch.dtype, shared: int, chunk: int = 0
) -> Blocks:
    """Return the blocks of a kernel from sizes, dtype and card, never from T.

    Args:
        role: A role in _TILES.
        width: Pairs of a query, or its components if nothing rotates.
        parts: 2 if pairs rotate, else 1.
        shared: Bytes of shared memory that the card has for a program.
        chunk: The caller's chunk size, 0 for the default.
    """
    bw, be = power(width), power(e)
    widest = max(bw * parts, be, 64)
    c, columns, warps, stages = 16, 32, 8, 2
    if dtype.itemsize == 2:
        c, columns, warps = _TILES[dtype][role].get((widest, parts), (c, columns, warps))
    if chunk:
        c = min(c, power(chunk))
    if role in ("grad_q", "grad_k"):
        bw = min(bw, max(columns // parts, 16))
    elif role != "grad_kv":
        be = min(be, columns)
    if shared < _SHARED.get(dtype, {}).get(widest, (0, 0))[0]:
        stages = 1
    if (role, dtype, bw, parts) == ("grad_q", torch.float32, 16, 2):
        stages = 1  # Triton 3.6.0 cannot compile two stages for features of rotated pairs
    return Blocks(c, bw, be, warps, stages)


def too_wide(widths: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a card has too little shared memory for D, R and E, or None."""
    least = _SHARED.get(dtype, {}).get(power(max(widths)), (0, 0))[1]
    if not least or common.card(device).shared >= least:
        return None
    return (
        f"takes D, R and E = {', '.join(map(str, widths))} of {dtype} on cards with {least} bytes "
        f"of shared memory for a program, this one has {common.card(device).shared}"
    )
