"""What the backends with kernels do with tensors alike."""

from __future__ import annotations

import torch
from torch import Tensor


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
