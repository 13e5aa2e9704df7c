"""The data that describes a positional map to a kernel; what it computes is in reference.py."""

from __future__ import annotations

from typing import NamedTuple

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
