"""Backend "reference": the specification, in plain differentiable PyTorch.

Shapes: queries and keys [B, T, H, D], values [B, T, H, E], features [B, T, H, R], positions
[B or 1, T, L] in float64. Every function works in the dtype it is given, float64 included, and
can be differentiated any number of times. Phases are always reduced in float64.
"""

from __future__ import annotations

import torch

from .causal_dot import (
    absorb,
    causal_dot,
    chunked,
    empty_state,
    features,
    normalized,
    quadratic,
    readout,
    recurrent,
    rotate,
)
from .elementwise import FEATURE_MAPS
from .noise import philox_normal
from .sine_features import phases, sine_features, spread

__all__ = [
    "FEATURE_MAPS",
    "absorb",
    "causal_dot",
    "chunked",
    "describe",
    "empty_state",
    "features",
    "normalized",
    "phases",
    "philox_normal",
    "quadratic",
    "readout",
    "recurrent",
    "rotate",
    "sine_features",
    "spread",
    "unavailable",
    "unsupported",
]


def unavailable(device: torch.device) -> None:
    """Return None: it runs on every machine."""


def unsupported(device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]) -> None:
    """Return None: it takes tensors on every device, of all dtypes and widths."""


def describe() -> str:
    """Return how it runs."""
    return "plain PyTorch, every device"
