"""Checks and sums of tensors, and zeros at padding: shared by backends and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCAN = ("q", "k", "v", "s0", "z0", "positions", "freq", "ranges")
SCAN_BACKWARD = ("q", "grad_o", "grad_s", "grad_z", "o", "den")
SINES = ("x", "positions", "freq", "offset", "gain", "gate", "noise")


def check_devices(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on the device of the first.

    A kernel takes addresses and would crash at one of another device. The public functions check
    their arguments; this check finds tensors that were kept from an earlier call.
    """
    first = tensors[0]
    # the cheapest questions: every step of decoding asks them
    if first.is_cpu:
        wrong = [x for x in tensors if x is not None and not x.is_cpu]
    else:
        index = first.get_device()
        wrong = [x for x in tensors if x is not None and x.get_device() != index]
    if wrong:
        name = next(n for n, x in zip(names, tensors, strict=True) if x is wrong[0])
        where = f"{first.device}, got {wrong[0].device}"
        raise ValueError(f"{name} must be on the device of {names[0]}, {where}")


def contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return x as the kernels read tables and states: of a dtype, one number after another."""
    if x is None or (x.dtype is dtype and x.is_contiguous() and not x.is_neg()):
        return x
    return x.to(dtype).contiguous().resolve_neg()


def sum_groups(x: Tensor, dim: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Return a gradient with H heads at `dim` added up to those that neighbours share, in dtype."""
    if x.shape[dim] != heads:
        x = x.unflatten(dim, (heads, -1)).sum(dim + 1)
    return x.to(dtype)


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Return a gradient summed over the batch or the heads, where they share what it is of."""
    return (x.sum(0, keepdim=True) if like.shape[0] == 1 else x).to(like.dtype)


def blank(x: Tensor, padding: Tensor | None) -> Tensor:
    """Return x [B, T, ...] with zeros at padding, also in place of NaN."""
    if padding is None:
        return x
    return x.masked_fill(padding.view(*padding.shape, *(1,) * (x.ndim - 2)), 0)
