"""FAVOR+: positive random features of the softmax kernel, stable and causal."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_positive
from ..backends.specs import Rotation, SineMap
from ..encodings.redraw import Resampled
from ..ops.noise import OMEGA, orthogonalized, philox_normal
from ..ops.position_map import encoded
from .base import FeatureMap


class Favor(Resampled, FeatureMap):
    """FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794), with E phi(q) . phi(k) = e^(q.k/sqrt(F)).

    phi_j(x) = exp(w_j . y - |y|^2 / 2) / sqrt(R) with y = x F^(-1/4), where F is the width of the
    map's input: D, or the encoding's feature_dim. An encoding with scale="matched" then gives the
    usual exp(sum_d q_d k_d C_d / sqrt(D)). With SineSPE(num_realizations=None) and
    FStripe(pool=False) the F features are never formed: one kernel projects q and k to w_j . y.

    Attention measures each feature from its running maximum, so nothing overflows and the sum of
    weights is at least 1. A later key changes no output by more than rounding. Use normalize=True;
    eps is ignored. PyTorch forms the features on every backend. On a CPU the backend's scan adds
    them up if none grows by e^40 within a call; otherwise PyTorch does (`log_scan`). Every head of
    queries has its own state, even if heads share keys.

    Args:
        num_features: R, even with signs; default 2 F with signs, else F.
        orthogonal: True makes the w of a head orthogonal in blocks of F, with independent lengths.
        signs: True uses R / 2 vectors w and their negatives.
        per_head: True draws w for each head, False once for all heads.
        resample: When training redraws w: "forward", "never", or n for every n-th forward.
        seed: Seed of the noise; default drawn from torch's generator. A copy of the module has the
            same noise until you call its `reseed_()`.

    Raises:
        ValueError: an argument is not as above.
    """

    route = "favor"
    per_head_state = True

    def __init__(
        self,
        num_features: int | None = None,
        *,
        orthogonal: bool = True,
        signs: bool = True,
        per_head: bool = True,
        resample: str | int = "forward",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("orthogonal", orthogonal), ("signs", signs), ("per_head", per_head)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if num_features is not None:
            check_positive("num_features", num_features)
            if signs and num_features % 2:
                raise ValueError(f"num_features must be even with signs, got {num_features}")
        self.num_features, self.orthogonal = num_features, orthogonal
        self.signs, self.per_head = signs, per_head
        self._init_noise(resample, seed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Take the seed you gave, or draw one, and restart the step at 0."""
        self._reset_noise()

    def check_normalize(self, normalize: bool | str) -> None:
        """Raise ValueError unless normalize is True.

        Args:
            normalize: True, False or "abs".
        """
        if normalize is not True:
            raise ValueError(
                "normalize must be True with Favor, whose features are known up to a factor, got "
                f"{normalize!r}"
            )

    def feature_dim(self, width: int) -> int:
        """R = num_features; by default 2 F with signs, else F."""
        return self.num_features or width * (1 + self.signs)

    def omega(self, num_heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the w in use, [num_heads, width, M], in a dtype: M = R / 2 with signs, else R."""
        columns = self.feature_dim(width) // (1 + self.signs)
        drawn = self._noise(num_heads if self.per_head else 1, width, columns, dtype)
        return drawn.expand(num_heads, -1, -1)

    def _draw(self, heads: int, width: int, columns: int, dtype: torch.dtype) -> Tensor:
        seed, step = self.noise_key
        z = philox_normal(seed, step, self.module_id, OMEGA, (heads, width, columns), dtype)
        return orthogonalized(z) if self.orthogonal else z

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, [..., H, R]; unlike attention, they can overflow."""
        exponent, half_square = self.exponents(x)
        return (exponent - half_square).exp() * exponent.shape[-1] ** -0.5

    def exponents(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        position_map: Rotation | SineMap | None = None,
        backend: str = "reference",
    ) -> tuple[Tensor, Tensor]:
        """Return +-w . y, [..., H, R], and |y|^2 / 2, [..., H, 1], of encoded x.

        Args:
            x: Queries or keys, [..., H, D]; with a position_map [B, T, H, D].
            positions: Their positions, [B or 1, T, L], float64.
            position_map: The map from x to y F^(1/4), or None if x is encoded already.
            backend: The backend that runs the map.
        """
        heads, d = x.shape[-2:]
        if isinstance(position_map, SineMap) and position_map.exact:
            width = position_map.feature_dim
            omega = self.omega(heads, width, x.dtype)
            projected = position_map._replace(noise=omega.unflatten(1, (d, position_map.rows)))
            # cos^2 + sin^2 = 1: |y|^2 is the same at every position
            weight = position_map.gain.square().sum(-1)
            if position_map.gate is not None:
                weight = weight + position_map.gate.square()
            square = (weight.to(x.dtype) * x.square()).sum(-1, keepdim=True)
            exponent = encoded(x, positions, projected, backend)
        else:
            y = encoded(x, positions, position_map, backend)
            width = y.shape[-1]
            exponent = torch.einsum("...hf,hfm->...hm", y, self.omega(heads, width, x.dtype))
            square = y.square().sum(-1, keepdim=True)
        exponent = exponent * width**-0.25
        if self.signs:
            exponent = torch.cat((exponent, -exponent), -1)
        return exponent, square / (2 * width**0.5)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"num_features={self.num_features}, orthogonal={self.orthogonal}, "
            f"signs={self.signs}, per_head={self.per_head}, resample={self.resample!r}"
        )
