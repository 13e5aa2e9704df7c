"""Stochastic positional encoding with sines."""

from __future__ import annotations

from .sines import SineEncoding


class SineSPE(SineEncoding):
    """Sinusoidal stochastic positional encoding (Liutkus et al. 2021, arXiv 2105.08399).

    R random features whose expected products are q^T diag(C(lag)) k / sqrt(D) up to sqrt(R):
    C_d(lag) = (1 - g_d) sum_k lambda_dk^2 cos(2 pi f_dk lag + theta_dk) / (2 K) + g_d. The gate has
    the PyTorch package's sign: g = 1 switches position off; negate a gate of the JAX package.
    Parameters are the published ones, all [H, D, K(, 1)]: freqs, f = sigmoid(freqs) / 2 cycles per
    unit of position; offsets, theta in radians; gains, lambda = softplus(gains). And gate [H, D],
    g = sigmoid(gate).

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H.
        num_sines: K.
        num_realizations: R; None gives the D (2 K + gate) features whose products are the
            expectation itself, exact and without noise.
        gated: A learned part of each component ignores position.
        resample: When training redraws the noise: "forward", "never", or n: at every n-th forward.
        seed: Of the noise; default drawn from torch's generator. A copy of the module has the same
            until its `reseed_()` is called.
        noise: "gaussian" as published; "orthogonal" makes its columns orthogonal, for M = D (2 K +
            gate) >= R times the variance about 1 - R / M, none at R = M. The products of features
            are then no longer sums of independent ones.

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
        """Return an encoding for a further layer: the same codes, a gate of its own.

        Orthogonal noise is the gate's too, so there all layers have the same; else it is its own.
        Give this module to the first layer and shares to the others: the first redraws the noise
        at each training forward and all use it.
        """
        self._num_shares += 1
        return SharedSineSPE(self, self._num_shares)


class SharedSineSPE(SineSPE):
    """A share of a SineSPE's frequencies, offsets, gains and noise, with its own gate.

    Args:
        source: The SineSPE that holds them.
        module_id: Tells the noise of this gate from the others'.
    """

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
        """Return a further share of the same source."""
        return self.source.share()

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{super().extra_repr()}, module_id={self.module_id}"
