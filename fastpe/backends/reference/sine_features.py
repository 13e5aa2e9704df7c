"""The features of SPE and F-StrIPE in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..specs import SineMap


def phases(positions: Tensor, freq: Tensor) -> Tensor:
    """Return 2 pi (freq . position) in radians, reduced to one turn, in float64.

    Args:
        positions: [B or 1, T, L].
        freq: [..., L], cycles per unit of position.
    Returns:
        [B or 1, T, ...].
    """
    turns = torch.tensordot(positions.double(), freq.double(), dims=([-1], [-1]))
    return 2 * math.pi * (turns - turns.detach().round())


def spread(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Return x with `heads` heads at `dim`: each repeated for the neighbours that share it."""
    times = heads // max(x.shape[dim], 1)
    return x if times <= 1 else x.repeat_interleave(times, dim)


def sine_features(x: Tensor, positions: Tensor, sines: SineMap, group: bool = True) -> Tensor:
    """Return the features of SPE and F-StrIPE (arXiv 2105.08399; 2502.10491, eqs. 3-9).

    Row 2k of component d is gain x_d cos(phase), row 2k + 1 the sine, row 2K the gate's.
    `group` has no effect here.
    """
    angle = phases(positions, sines.freq)  # [B or 1, T, H, D, K]
    if sines.offset is not None:
        angle = angle + 2 * math.pi * sines.offset.double()
    rows = torch.stack((angle.cos(), angle.sin()), dim=-1).to(x.dtype)
    rows = (rows * sines.gain[..., None].to(x.dtype)).flatten(-2)  # [B or 1, T, H, D, 2K]
    if sines.gate is not None:
        gate = sines.gate[..., None].to(x.dtype)
        rows = torch.cat((rows, gate.expand(*rows.shape[:-1], 1)), dim=-1)
    rows = spread(x, sines.freq.shape[0])[..., None] * rows
    if sines.noise is not None:
        return torch.einsum("bthdj,hdjr->bthr", rows, sines.noise.to(x.dtype))
    return rows.sum(-2) if sines.pool else rows.flatten(-2)
