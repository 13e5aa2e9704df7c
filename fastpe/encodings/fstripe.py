"""F-StrIPE: positional encoding by musical structure."""

from __future__ import annotations

from collections.abc import Sequence

from .sines import SineEncoding


class FStripe(SineEncoding):
    """F-StrIPE (arXiv 2502.10491): SPE's sines of structural positions, such as chords or phrases.

    Positions are numbers or vectors; they may repeat and come in any order. Choose the features:

    * pooled (default, the published method, eqs. 7 and 9): 2 K features, sums over D. These sums
      mix components, so products are NOT a function of position differences.
    * pool=False (eq. 5): all 2 K D features; products are exactly sum_d q_d k_d P_d(s_m - s_n),
      P_d = sum_k lambda_dk^2 cos(2 pi f_dk . (s_m - s_n) + theta_dk) / K.
    * num_realizations=R: F-StrIPE:SFF, SPE's noise (eqs. 3, 4, 6), with mean P_d / 2.

    The parameters are those of `SineSPE`, with freqs for each of L levels: f = sigmoid(freqs) / 2
    cycles per unit of position.

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H.
        num_levels: Components L of a position, e.g. 12 for a chroma vector.
        num_sines: K; default 32 pooled, 1 unpooled, 10 with noise.
        pool: True sums the features over D.
        num_realizations: R, the noisy features of F-StrIPE:SFF.
        gated: True lets a learned part of each component ignore position; not for pooled features.
        unit_gains: True fixes lambda = 1 and theta = 0. With num_sines=1 and pool=False this is
            F-StrIPE_1 (arXiv 2504.05364, eq. 15).
        resample: When training redraws the noise: "forward", "never", or n for every n-th forward.
        seed: Seed of the noise; default drawn from torch's generator. A copy of the module has the
            same noise until you call its `reseed_()`.
        noise: "gaussian", or "orthogonal" with less variance, see `SineSPE`.
        scale: "matched" or "paper", see `PositionalEncoding.kernel`.
        frequency: Median initial frequency in cycles per unit of position, between 0 and 1/2; one
            number, or one for each level. The default 0.009 is SPE's, for time. Labels that differ
            by one or a few look alike to it and learn faster from about 0.13.

    Raises:
        ValueError: an argument is not as above, pool=False with num_realizations, gated pooled
            features, or orthogonal noise without num_realizations.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_levels: int = 1,
        num_sines: int | None = None,
        pool: bool = True,
        num_realizations: int | None = None,
        gated: bool = False,
        unit_gains: bool = False,
        resample: str | int = "forward",
        seed: int | None = None,
        noise: str = "gaussian",
        scale: str = "matched",
        frequency: float | Sequence[float] | None = None,
    ) -> None:
        noisy = num_realizations is not None
        if noisy and not pool:
            raise ValueError(
                "pool must be True with num_realizations, which projects the features, got False"
            )
        if gated and pool and not noisy:
            raise ValueError("gated must be False for pooled features, got True")
        if num_sines is None:
            num_sines = 10 if noisy else 32 if pool else 1
        super().__init__(
            head_dim,
            num_heads,
            num_levels=num_levels,
            num_sines=num_sines,
            num_realizations=num_realizations,
            pool=pool,
            gated=gated,
            mean_over=2 * num_sines if noisy else num_sines,
            resample=resample,
            seed=seed,
            noise=noise,
            scale=scale,
            unit_gains=unit_gains,
            frequency=frequency,
        )

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{super().extra_repr()}, unit_gains={self.unit_gains}"
