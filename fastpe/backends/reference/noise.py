"""Philox4x32-10 (Salmon et al. 2011) and Box-Muller in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _round(c: list[Tensor], k0: Tensor, k1: Tensor) -> list[Tensor]:
    # int64 products wrap, which keeps their low 64 bits: both halves are exact
    p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
    hi0, hi1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
    return [hi1 ^ c[1] ^ k0, p1 & _MASK, hi0 ^ c[3] ^ k1, p0 & _MASK]


def philox_normal(
    seed: Tensor,
    step: Tensor,
    module: int,
    kind: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """Return standard normal numbers [HD, J, R] for the key (seed, module, kind) and the step.

    Number (hd, j, r) is lane r mod 4 of counter (r // 4, first + j, hd, step): docs/math.md,
    "Noise".

    Args:
        seed: int64 scalar tensor; all 64 bits are used.
        step: int64 scalar tensor, its low 32 bits are used.
        module: which of the modules that share a seed, 0 .. 2^29 - 1.
        kind: SINE, GATE, CONV or OMEGA.
        shape: (HD, J, R).
        dtype: of the result; float64 and float32 are computed in float64.
        first: row to begin with, of either sign; its low 32 bits are used.
    """
    device = seed.device
    hd, j, blocks = shape[0], shape[1], -(-shape[2] // 4)
    k0 = seed & _MASK
    k1 = ((seed >> 32) & _MASK) ^ ((module << 3 | kind) & _MASK)
    c = [
        torch.arange(blocks, device=device).expand(hd, j, blocks),
        (torch.arange(first, first + j, device=device) & _MASK)[:, None].expand(hd, j, blocks),
        torch.arange(hd, device=device)[:, None, None].expand(hd, j, blocks),
        (step & _MASK).expand(hd, j, blocks),
    ]
    for _ in range(10):
        c = _round(c, k0, k1)
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    u = [((x >> 9).double() + 0.5) * 2.0**-23 for x in c]
    lanes = []
    for u0, u1 in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * u0.log()).sqrt(), 2 * math.pi * u1
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, -1).flatten(-2)[..., : shape[2]].to(dtype)
