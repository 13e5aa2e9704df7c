"""Stochastic positional encoding with filtered noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_positive
from ..backends.specs import Band
from ..ops.conv_features import Filter, KeptNoise, conv_features
from ..ops.noise import GATE, philox_normal
from .base import PositionalEncoding
from .redraw import Resampled
from .sines import gate_roots


class ConvSPE(Resampled, PositionalEncoding):
    """Convolutional stochastic positional encoding (Liutkus et al. 2021, arXiv 2105.08399).

    The code of a position is the noise around it, filtered by weight_q for queries and weight_k for
    keys, [H, D, kappa]. The R random features have expected products sqrt(R / D) q^T diag(C(lag)) k
    with C_d(lag) = (1 - g_d) P_d(lag) + g_d and
    P_d(lag) = sum_j weight_q[d, j] weight_k[d, j + lag], zero for |lag| >= kappa. The gate [H, D]
    has the PyTorch package's sign: g = 1 switches position off.

    Positions must be integers; checking them synchronises with the GPU. Features have no second
    derivative. Noise is drawn for 64 positions at a time and kept while decoding (25 MB with
    D H = 512, R = 64, kappa = 128).

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H.
        kernel_size: kappa.
        num_realizations: R; None weights keys by the expectation itself, without noise, in time
            proportional to kappa for each token. This needs causal attention,
            feature_map="identity" and default positions.
        gated: True lets a learned part of each component ignore position.
        resample: When training redraws the noise: "forward", "never", or n for every n-th forward.
        seed: Seed of the noise; default drawn from torch's generator. A copy of the module has the
            same noise until you call its `reseed_()`.

    Raises:
        ValueError: an argument is not as above.
    """

    integer_positions = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        kernel_size: int = 128,
        num_realizations: int | None = 64,
        gated: bool = True,
        resample: str | int = "forward",
        seed: int | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads)
        check_positive("kernel_size", kernel_size)
        if num_realizations is not None:
            check_positive("num_realizations", num_realizations)
        if num_heads is None:
            raise ValueError("num_heads must be a positive int, got None")
        if not isinstance(gated, bool):
            raise ValueError(f"gated must be True or False, got {gated!r}")
        self.kernel_size, self.num_realizations, self.gated = kernel_size, num_realizations, gated
        self.weight_q = nn.Parameter(torch.empty(num_heads, head_dim, kernel_size))
        self.weight_k = nn.Parameter(torch.empty(num_heads, head_dim, kernel_size))
        if gated:
            self.gate = nn.Parameter(torch.empty(num_heads, head_dim))
        self._init_noise(resample, seed, random=num_realizations is not None)
        self._num_shares = 0
        self._kept = KeptNoise()
        self.reset_parameters()

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_kept": KeptNoise()}

    def reset_parameters(self) -> None:
        """Draw this module's parameters as SPE's code does, and the seed if you gave none."""
        self._reset_noise()
        with torch.no_grad():
            for name in ("weight_q", "weight_k"):
                if name in self._parameters:
                    getattr(self, name).uniform_(0, (self.kernel_size / 2) ** -0.5)
            if self.gated:
                self.gate.normal_()

    @property
    def feature_dim(self) -> int:
        """R; without noise the rows of a state, D for a gate and kappa - 1 last values."""
        if self.num_realizations is not None:
            return self.num_realizations
        return self.kernel_size - 1 + self.gated * self.head_dim

    @property
    def norm_dim(self) -> int:
        """R; without noise the size of z in a state: sums for the gate, last keys."""
        if self.num_realizations is not None:
            return self.num_realizations
        return (self.kernel_size - 1 + self.gated) * self.head_dim

    def state_widths(self, normalize: bool | str) -> tuple[int, int]:
        """Return R and Rz; without noise a state keeps keys whatever normalize says."""
        if self.num_realizations is not None:
            return super().state_widths(normalize)
        return self.feature_dim, self.norm_dim

    @property
    def route(self) -> str:
        """Without noise attention is to a band of lags, exact and without features."""
        return "banded" if self.num_realizations is None else "linear"

    def _filters(self) -> ConvSPE:
        # the module that holds filters and noise; a share returns its source
        return self

    def _noise_source(self) -> ConvSPE:
        return self._filters()

    def map_inputs(self) -> list[Tensor]:
        """Return the parameters; a share returns its source's filters."""
        source = self._filters()
        return [source.weight_q, source.weight_k, *([self.gate] if self.gated else [])]

    def _roots(self) -> tuple[Tensor | float, Tensor | None]:
        return gate_roots(self.gate) if self.gated else (1.0, None)

    def features(self, x: Tensor, positions: Tensor, side: str) -> Tensor:
        """Return products of queries or keys with codes, [B, T, H, R]."""
        if self.num_realizations is None:
            raise ValueError("num_realizations must be given for features, got None")
        source, (root, gate_root) = self._filters(), self._roots()
        scale = (self.num_realizations * self.head_dim) ** -0.25
        weight = (source.weight_q if side == "q" else source.weight_k).double() * scale
        constant = None
        if gate_root is not None:
            dtype = torch.promote_types(self.gate.dtype, torch.float32)
            weight = weight * root[..., None]
            constant = gate_root[..., None] * scale * self._noise(dtype)
        seed, step = self.noise_key
        fir = Filter(weight, constant, seed, step, source.module_id, self.num_realizations)
        return conv_features(x, positions, fir, source._kept)

    def _draw(self, dtype: torch.dtype) -> Tensor:  # the gate's noise, [H, D, R]
        seed, step = self.noise_key
        h, d, r = self.num_heads, self.head_dim, self.num_realizations
        return philox_normal(seed, step, self.module_id, GATE, (h * d, 1, r), dtype).view(h, d, r)

    def make_maps(self, device: torch.device | None = None) -> tuple[Band, Band] | None:
        """Return the weights of lags 0 .. kappa - 1 without noise, else None."""
        return None if self.num_realizations is not None else self._lasting(self._bands, device)

    def _bands(self) -> tuple[Band, Band]:
        root, gate_root = self._roots()
        kernel = self._correlation((0, self.kernel_size - 1))
        band = Band(kernel if gate_root is None else root[..., None] ** 2 * kernel, gate_root)
        return band, band

    def _correlation(self, pad: tuple[int, int]) -> Tensor:
        # P_d of lags -pad[0] .. pad[1], [H, D, lags]
        source = self._filters()
        a, b = (w.double().flatten(0, 1) for w in (source.weight_q, source.weight_k))
        p = F.conv1d(F.pad(b, pad)[None], a[:, None], groups=len(a))[0]
        return p.unflatten(0, (self.num_heads, self.head_dim))

    def power(self, side: str) -> Tensor:
        """Return the mean square of codes in units of C, [H, D], float64; side is "q" or "k"."""
        source = self._filters()
        weight = source.weight_q if side == "q" else source.weight_k
        p = weight.detach().cpu().double().square().sum(-1)
        if self.gated:
            g = self.gate.detach().cpu().double().sigmoid()
            p = (1 - g) * p + g
        return p

    def kernel(self, positions_q: Tensor, positions_k: Tensor | None = None) -> Tensor:
        """Return C, [..., H, D, D], diagonal; positions must be integers."""
        lag = (self._levels(positions_q) - self._levels(positions_k))[..., 0]
        if not torch.equal(lag, lag.round()):
            raise ValueError("positions must be integers with ConvSPE, got others")
        reach = self.kernel_size - 1
        table = F.pad(self._correlation((reach, reach)).detach().cpu(), (1, 1)).movedim(-1, 0)
        c = table[(lag.clamp(-reach - 1, reach + 1) + reach + 1).long()]  # [..., H, D]
        if self.gated:
            g = self.gate.detach().cpu().double().sigmoid()
            c = (1 - g) * c + g
        return torch.diag_embed(c)

    def share(self) -> SharedConvSPE:
        """Return an encoding for another layer: the same codes, its own gate.

        Give this module to the first layer and shares to the others. The first layer redraws the
        noise at each training forward, and all layers use it.
        """
        self._num_shares += 1
        return SharedConvSPE(self, self._num_shares)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"{self.head_dim}, {self.num_heads}, kernel_size={self.kernel_size}, "
            f"num_realizations={self.num_realizations}, gated={self.gated}, "
            f"resample={self.resample!r}"
        )


class SharedConvSPE(ConvSPE):
    """The filters and noise of a ConvSPE with another gate, whose noise has this module_id."""

    def __init__(self, source: ConvSPE, module_id: int) -> None:
        super().__init__(
            source.head_dim,
            source.num_heads,
            kernel_size=source.kernel_size,
            num_realizations=source.num_realizations,
            gated=source.gated,
            resample=source.resample,
            seed=0,
        )
        self.source = source
        self.module_id = module_id
        del self.weight_q, self.weight_k
        if source.num_realizations is not None:
            del self.seed_code, self.step_code

    def _filters(self) -> ConvSPE:
        return self.source

    def share(self) -> SharedConvSPE:
        """Return another share of the same source."""
        return self.source.share()

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{super().extra_repr()}, module_id={self.module_id}"
