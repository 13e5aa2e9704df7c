"""Backend "cpu": the C++ kernels of csrc/cpu, called through the C ABI of csrc/fastpe.h."""

from __future__ import annotations

from . import library as library
from .causal_dot import causal_dot, causal_dot_backward, shared_memory
from .library import CPU, CUDA, ISAS, Library, describe, libraries, unavailable, unsupported
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
