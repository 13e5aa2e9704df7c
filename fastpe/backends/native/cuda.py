"""Backend "cuda": the CUDA C++ kernels, for cards of compute capability 8.0 and later."""

from __future__ import annotations

import torch

from .causal_dot import causal_dot, causal_dot_backward, shared_memory
from .library import CUDA
from .sine_features import sine_features, sine_features_backward
from .step import step

__all__ = [
    "causal_dot",
    "causal_dot_backward",
    "describe",
    "sine_features",
    "sine_features_backward",
    "step",
    "unavailable",
    "unsupported",
]


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run, or None; `unsupported` looks at the device."""
    reason = CUDA.unavailable()
    if reason is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return reason


def unsupported(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str | None:
    """Return why tensors on a device with these D, R and E cannot be taken, or None."""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device}"
    card = torch.cuda.get_device_properties(device)
    if card.major < 8:
        return f"needs compute capability 8.0, {card.name} has {card.major}.{card.minor}"
    needed, there = shared_memory(dtype, widths), card.shared_memory_per_block_optin
    if needed > there:
        d, r, e = widths
        return (
            f"cannot hold head sizes D = {d}, R = {r}, E = {e} in {dtype}: "
            f"{needed} bytes of shared memory are needed, {card.name} has {there}"
        )
    return None


def describe() -> str:
    """Return the card in use."""
    return torch.cuda.get_device_name()
