"""Stochastic positional encoding with sines."""

from __future__ import annotations

from .sines import SineEncoding


class SineSPE(SineEncoding):
    """Sinusoidal stochastic positional encoding (Liutkus et al. 2021, arXiv 2105.08399).

    The R random features have expected products sqrt(R / D) q^T diag(C(lag)) k with
    C_d(lag) = (1 - g_d) sum_k lambda_dk^2 cos(2 pi f_dk lag + theta_dk) / (2 K) + g_d.

    The parameters are the published ones: freqs [H, D, K, 1], f = sigmoid(freqs) / 2 cycles per
    unit of position; offsets [H, D, K], theta in radians; gains [H, D, K],
    lambda = softplus(gains); gate [H, D], g = sigmoid(gate). The gate has the PyTorch package's
    sign: g = 1 switches position off. Negate a gate of the JAX package.

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H.
        num_sines: K.
        num_realizations: R; None gives D (2 K + gate) features without noise, whose products are
            exactly the expectation.
        gated: True lets a learned part of each component ignore position.
        resample: When training redraws the noise: "forward", "never", or n for every n-th forward.
        seed: Seed of the noise; default drawn from torch's generator. A copy of the module has the
            same noise until you call its `reseed_()`.
        noise: "gaussian" as published, or "orthogonal" columns. For R <= M = D (2 K + gate),
            orthogonal noise has about 1 - R / M of the variance, none at R = M. Its features are
            no longer independent.

    Raises:
        ValueError: an argument is not as above, or orthogonal noise without num_realizations.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_sines: int = 10,
        num_realizations: int | None = 64,
        gated: bool = True,
        resample: str | int = "forward",
        seed: int | None = None,
        noise: str = "gaussian",
    ) -> None:
        super().__init__(
            head_dim,
            num_heads,
            num_levels=1,
            num_sines=num_sines,
            num_realizations=num_realizations,
            pool=False,
            gated=gated,
            mean_over=2 * num_sines,
            resample=resample,
            seed=seed,
            noise=noise,
            scale="matched",
        )
        self._num_shares = 0

    def share(self) -> SharedSineSPE:
        """Return an encoding for another layer: the same codes, its own gate.

        Give this module to the first layer and shares to the others. The first layer redraws the
        noise at each training forward, and all layers use it. Each gate has its own Gaussian noise;
        orthogonal noise is the same for all gates.
        """
        self._num_shares += 1
        return SharedSineSPE(self, self._num_shares)


class SharedSineSPE(SineSPE):
    """The sines and noise of a SineSPE with another gate, whose noise has this module_id."""

    def __init__(self, source: SineSPE, module_id: int) -> None:
        super().__init__(
            source.head_dim,
            source.num_heads,
            num_sines=source.num_sines,
            num_realizations=source.num_realizations,
            gated=source.gated,
            resample=source.resample,
            seed=0,
            noise=source.noise,
        )
        self.source = source
        self.module_id = module_id
        del self.freqs, self.offsets, self.gains
        if source.num_realizations is not None:
            del self.seed_code, self.step_code

    def _sines(self) -> SineSPE:
        return self.source

    def share(self) -> SharedSineSPE:
        """Return another share of the same source."""
        return self.source.share()

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{super().extra_repr()}, module_id={self.module_id}"
