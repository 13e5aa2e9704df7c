"""Backend "cpu": the C++ kernels of csrc/cpu, called through the C ABI of csrc/fastpe.h."""

from __future__ import annotations

import torch

from . import library as library
from .causal_dot import causal_dot, causal_dot_backward, shared_memory
from .library import CPU, CUDA, ISAS, Library, libraries
from .noise import philox_normal
from .sine_features import sine_features, sine_features_backward
from .step import step

__all__ = [
    "CPU",
    "CUDA",
    "ISAS",
    "Library",
    "causal_dot",
    "causal_dot_backward",
    "describe",
    "libraries",
    "philox_normal",
    "shared_memory",
    "sine_features",
    "sine_features_backward",
    "step",
    "unavailable",
    "unsupported",
]


def unavailable(device: torch.device) -> str | None:
    """Return why the library cannot be used, or None, whatever the device."""
    return CPU.unavailable()


def unsupported(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str | None:
    """Return why tensors on a device cannot be taken, or None; dtypes and widths all can."""
    return None if device.type == "cpu" else f"needs tensors on the CPU, got {device}"


def describe() -> str:
    """Return the code path and threading in use."""
    openmp = "OpenMP" if CPU.functions.fastpe_openmp() else "one thread, built without OpenMP"
    return f"{ISAS[CPU.functions.fastpe_best_isa()]}, {openmp}"
