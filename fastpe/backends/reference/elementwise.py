"""The feature maps that act on each component alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# added by the relu map, so that a query of negatives still sees every key (SPE's LRA code)
RELU_SHIFT = 1e-3


def elu1(x: Tensor) -> Tensor:
    """Return elu(x) + 1: x + 1 above zero, exp(x) below (Katharopoulos et al. 2020, eq. 7)."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0) + 1e-3."""
    return x.relu() + RELU_SHIFT


def exp(x: Tensor) -> Tensor:
    """Return e^x; float32 overflows at x = 88.7."""
    return x.exp()


def identity(x: Tensor) -> Tensor:
    """Return x: for features made by the caller; normalize="abs" or False."""
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": elu1,
    "relu": relu,
    "exp": exp,
    "identity": identity,
}
