"""Specs: an encoding as data for a kernel, the options of the scan, dtypes.

Operators and backends import this module; it imports neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Rotate pairs of components by 2 pi freq . position; the scan does it as it loads.

    Attributes:
        freq: [H or 1, W, L], cycles per unit of position, one row per pair; components from
            2 W on pass unrotated.
        interleaved: pairs are (2i, 2i + 1), else (i, i + W).
        pool: keep only the sum of the two rotated components (RoPEPool, eq. 23), W features.
        map_first: rotate psi(x) and normalise with psi(x) (RoFormer), else psi(rotated x).
        scale: factor on the features.
    """

    freq: Tensor
    interleaved: bool
    pool: bool
    map_first: bool
    scale: float


class SineMap(NamedTuple):
    """Modulate each component by K sines of the position, then project or pool.

    Component d gives J rows: gain cos and gain sin of 2 pi (freq . position + offset) for each
    of K sines, and a constant row when gated. All but the noise are float64.

    Attributes:
        freq: [H, D, K, L], cycles per unit of position.
        offset: [H, D, K], cycles, or None.
        gain: [H, D, K].
        gate: [H, D], weight of the constant row, or None (then J = 2 K, else 2 K + 1).
        noise: [H, D, J, R], projects the D J rows to R features, or None.
        pool: without noise: sum over D (J features), else keep all D J rows.
    """

    freq: Tensor
    offset: Tensor | None
    gain: Tensor
    gate: Tensor | None
    noise: Tensor | None
    pool: bool

    @property
    def exact(self) -> bool:
        """Whether all D J rows are kept as they are."""
        return self.noise is None and not self.pool

    @property
    def rows(self) -> int:
        """J, the rows that one component gives."""
        return 2 * self.gain.shape[-1] + (self.gate is not None)

    @property
    def feature_dim(self) -> int:
        """R, the number of features."""
        if self.noise is not None:
            return self.noise.shape[-1]
        return self.rows if self.pool else self.rows * self.gain.shape[1]


class Band(NamedTuple):
    """Weigh keys by content and lag, up to a largest lag: exact ConvSPE for the linear kernel.

    The weight of key n for query m is sum_d q_d k_d (kernel_d[m - n] + gate_d^2).

    Attributes:
        kernel: [H, D, kappa], of lags 0 .. kappa - 1; float64.
        gate: [H, D], the part that ignores position, or None; float64.
    """

    kernel: Tensor
    gate: Tensor | None


class ScanOptions(NamedTuple):
    """How `causal_dot` makes features and weights; see `Rotation` for the middle four."""

    feature_map: str = "identity"
    normalize: str = "none"  # or "sum" or "abs"
    eps: float = 0.0
    interleaved: bool = False
    pool: bool = False
    map_first: bool = True
    scale: float = 1.0
    chunk: int = 0  # the backend's choice
    backend: str = "reference"

    @property
    def relative(self) -> bool:
        """Whether only differences of positions count, as long as no state goes in or out.

        The gradient of frequencies can then take positions from the first one on. They are small,
        so rounding errors that they multiply stay small too.
        """
        return not self.pool and (self.map_first or self.feature_map == "identity")

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Return R and Rz, the features of the numerator and of the normaliser."""
        r = head_dim // 2 if self.pool else head_dim
        # if psi comes first, the normaliser sees features before the rotation
        rz = head_dim if self.map_first else r
        return r, 0 if self.normalize == "none" else rz


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic and states: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state_heads(q: int, k: int, v: int, freq: int) -> int:
    """Return how many states there are, from the numbers of heads of q, k, v and freq (0 without).

    Heads of q share a state if they share keys and values, unless each rotates the keys by
    frequencies of its own.
    """
    return q if freq > 1 else max(k, v)
