"""How calls follow autocast: inputs in its dtype, sums in float32."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()


def autocast_dtype(x: object) -> torch.dtype | None:
    """Return the dtype autocast uses on the device of x, or None where autocast is off."""
    if not isinstance(x, Tensor):
        return None
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def follow_autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v in autocast's dtype, as `F.scaled_dot_product_attention` takes them.

    Where autocast is off, and for float64, they stay as they are.
    """
    dtype = autocast_dtype(inputs[0])
    if dtype is None:
        return inputs
    return tuple(x.to(dtype) if _lowered(x) else x for x in inputs)


def _lowered(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which autocast leaves the products of our own PyTorch code alone."""
    if autocast_dtype(x) is None:
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)
