"""FAVOR+: positive random features of the softmax kernel, stable and causal."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_positive
from .encoded import encoded
from .feature_maps import FeatureMap
from .log_scan import State, divided, log_scan
from .maps import Rotation, SineMap
from .noise import OMEGA, orthogonalized
from .ops import ScanOptions, causal_dot, observed, philox_normal
from .reference import spread
from .resampling import Resampled

# features up to e^40 of the first key's: sums over 10^6 tokens stay finite in float32, and a query
# that loses what is below float32's e^-87 loses nothing beside a denominator of at least 1
_GROWTH = 40.0


class Favor(Resampled, FeatureMap):
    """FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794), with E phi(q) . phi(k) = e^(q.k/sqrt(F)).

    phi_j(x) = exp(w_j . y - |y|^2 / 2) / sqrt(R) with y = x F^(-1/4), where F is the width of what
    the map sees: D, or the encoding's feature_dim. An encoding with scale="matched" then gives the
    usual exp(sum_d q_d k_d C_d / sqrt(D)). Of SineSPE(num_realizations=None) and
    FStripe(pool=False) the F features are never made: w_j . y is a projection of D (one stage).

    Attention measures features from the running maximum of each, so that nothing overflows and no
    output depends on a later key but for its rounding; the sum of weights is at least 1. Hence
    normalize=True without eps, which is ignored. Features are made in PyTorch on every backend; its
    scan adds them up where they grow by less than e^40 within a call, else PyTorch (`log_scan`).
    There is a state for each head of queries, also where these share keys.

    Args:
        num_features: R, even with signs; default 2 F with signs, else F.
        orthogonal: The w of a head are orthogonal in blocks of F, with independent lengths.
        signs: Use w and -w, R / 2 of them.
        per_head: Each head has w of its own, else all heads have the same.
        resample: When training redraws w: "forward", "never", or n: at every n-th forward.
        seed: Of the noise; default drawn from torch's generator. A copy of the module has the same
            until its `reseed_()` is called.

    Raises:
        ValueError: an argument is not as above.
    """

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
        """Take the seed that was given, or a new one, and begin to count again."""
        self._reset_noise()

    def feature_dim(self, width: int) -> int:
        """R = num_features; by default 2 F with signs, else F."""
        return self.num_features or width * (1 + self.signs)

    def omega(self, num_heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the columns w in use, [H, F, M]: M = R / 2 with signs, else R.

        Args:
            num_heads: H.
            width: F.
            dtype: Of the columns.
        """
        columns = self.feature_dim(width) // (1 + self.signs)
        drawn = self._noise(num_heads if self.per_head else 1, width, columns, dtype)
        return drawn.expand(num_heads, -1, -1)

    def _draw(self, heads: int, width: int, columns: int, dtype: torch.dtype) -> Tensor:
        seed, step = self.noise_key
        z = philox_normal(seed, step, self.module_id, OMEGA, (heads, width, columns), dtype)
        return orthogonalized(z) if self.orthogonal else z

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, [..., H, R], which overflow where attention does not."""
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
            x: [..., H, D], with a position_map [B, T, H, D].
            positions: [B or 1, T, L], float64.
            position_map: That makes the features y F^(1/4).
            backend: That runs it.
        """
        heads, d = x.shape[-2:]
        if isinstance(position_map, SineMap) and position_map.exact:
            width = position_map.feature_dim
            omega = self.omega(heads, width, x.dtype)
            projected = position_map._replace(noise=omega.unflatten(1, (d, position_map.rows)))
            # sines and cosines of one phase: |y|^2 is the same at every position
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


def favor_attention(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    state: State | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o and the final s, z and c: `log_scan`, by a backend's scan where features allow it.

    Args:
        a: Logarithms of the queries' features, up to one term for all of a query, [B, T, H, R].
        b: Logarithms of the keys' features, [B, T, H, R]; -inf for a masked key.
        v: Values, [B, T, Hk, E], of the same dtype; Hk divides H.
        state: s, z and c of the tokens before.
        chunk_size: Tokens that are handled together.
        backend: Of the scan.
    """
    if _level(b, state, backend):
        return _level_scan(a, b, v, state, chunk_size, backend)
    num, den, state = log_scan(a, b, spread(v, a.shape[2]), state, chunk_size)
    return divided(num, den), *state


def _first(b: Tensor, state: State | None) -> Tensor:
    """Return the running maximum at the first token, [B, H, R]."""
    first = b[:, 0].detach()
    return first if state is None else torch.maximum(state[2].detach(), first)


def _level(b: Tensor, state: State | None, backend: str) -> bool:
    """Return whether no feature grows much after the first token; not so if that is masked."""
    # a look at values, which a GPU would wait for and a compiler cannot take
    if backend == "reference" or b.device.type != "cpu" or observed() or not b.numel():
        return False
    return bool((b.detach().amax(1) - _first(b, state)).max() < _GROWTH)


def _level_scan(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    state: State | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same where all features can be measured from those of the first token."""
    c0 = _first(b, state)
    a, b = a + c0[:, None], b - c0[:, None]
    phi, psi = (a - a.detach().amax(-1, keepdim=True)).exp(), b.exp()
    options = ScanOptions.of_features("sum", 0.0, chunk_size, backend)
    before = (None, None)
    if state is not None:
        decay = (state[2].detach() - c0).exp()
        before = state[0] * decay[..., None], state[1] * decay
    o, s, z = causal_dot(phi, psi, v, *before, None, None, None, options=options)
    growth = b.detach().amax(1).clamp(min=0)
    decay = (-growth).exp()
    return o, s * decay[..., None], z * decay, c0 + growth
