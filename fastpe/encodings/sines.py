"""The base of SineSPE and F-StrIPE: sines with learned frequencies, offsets, gains, and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_positive
from ..backends.specs import SineMap
from ..ops.noise import GATE, SINE, frames, philox_normal
from .base import PositionalEncoding
from .redraw import Resampled
from .sharded import put


class SineEncoding(Resampled, PositionalEncoding):
    """K sines per component, f = sigmoid(freqs)/2 cycles per unit, lambda = softplus(gains).

    With num_realizations, noise projects the sines to R features. The noise has M = D (2 K + gate)
    rows; it is Gaussian, or its columns are orthogonal in blocks of M. `Resampled` says when it is
    redrawn.

    `SineSPE` and `FStripe` describe the other arguments.

    Args:
        mean_over: Denominator of the sum over sines, 2 K in SPE, K in F-StrIPE.
        frequency: Median initial frequency in cycles per unit of position, one number or L of
            them; default SPE's, sigmoid(-4) / 2.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_levels: int,
        num_sines: int,
        num_realizations: int | None,
        pool: bool,
        gated: bool,
        mean_over: int,
        resample: str | int,
        seed: int | None,
        noise: str,
        scale: str,
        unit_gains: bool = False,
        frequency: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_levels)
        check_positive("num_sines", num_sines)
        if num_realizations is not None:
            check_positive("num_realizations", num_realizations)
        flags = {"pool": pool, "gated": gated, "unit_gains": unit_gains}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if num_heads is None:
            raise ValueError("num_heads must be a positive int, got None")
        if noise not in ("gaussian", "orthogonal"):
            raise ValueError(f"noise must be 'gaussian' or 'orthogonal', got {noise!r}")
        if noise != "gaussian" and num_realizations is None:
            raise ValueError(f"noise must be 'gaussian' without num_realizations, got {noise!r}")
        if scale not in ("matched", "paper"):
            raise ValueError(f"scale must be 'matched' or 'paper', got {scale!r}")
        self.num_sines, self.num_realizations, self.pool = num_sines, num_realizations, pool
        self.gated, self.scale, self.unit_gains = gated, scale, unit_gains
        self._mean_over, self.noise = mean_over, noise
        self._start = _raw_frequencies(frequency, num_levels)
        shape = (num_heads, head_dim, num_sines)
        self.freqs = nn.Parameter(torch.empty(*shape, num_levels))
        if not unit_gains:
            self.offsets = nn.Parameter(torch.empty(shape))
            self.gains = nn.Parameter(torch.empty(shape))
        if gated:
            self.gate = nn.Parameter(torch.empty(num_heads, head_dim))
        self._init_noise(resample, seed, random=num_realizations is not None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw this module's parameters as SPE's code does, and the seed if you gave none."""
        self._reset_noise()
        with torch.no_grad():
            if "freqs" in self._parameters:
                start = torch.tensor(self._start, device="cpu")
                put(self.freqs, start.expand(self.freqs.shape))
                self.freqs.add_(torch.empty_like(self.freqs).normal_())
                if not self.unit_gains:
                    self.offsets.normal_()
                    self.gains.normal_()
                    # the square root of the norm, as published
                    self.gains.mul_(2 / self.gains.norm(dim=-1, keepdim=True).sqrt())
            if self.gated:
                self.gate.normal_()

    @property
    def exact(self) -> bool:
        """True if all D (2 K + gate) rows are features, without noise or sums."""
        return self.num_realizations is None and not self.pool

    @property
    def feature_dim(self) -> int:
        """R with noise; else 2 K pooled, or D (2 K + gate)."""
        if self.num_realizations is not None:
            return self.num_realizations
        rows = 2 * self.num_sines + self.gated
        return rows if self.pool else rows * self.head_dim

    def _sines(self) -> SineEncoding:
        # the module that holds frequencies and noise; a share returns its source
        return self

    def map_inputs(self) -> list[Tensor]:
        """Return the parameters; a share returns its source's sines."""
        source = self._sines()
        shared = [] if source.unit_gains else [source.offsets, source.gains]
        return [source.freqs, *shared, *([self.gate] if self.gated else [])]

    def _lambda_offset(self) -> tuple[Tensor, Tensor | None]:
        source = self._sines()
        if source.unit_gains:
            return torch.ones_like(source.freqs[..., 0], dtype=torch.float64), None
        return F.softplus(source.gains.double()), source.offsets.double() / (2 * math.pi)

    def make_maps(self, device: torch.device | None = None) -> tuple[SineMap, SineMap]:
        """Return the maps of queries, with offsets, and of keys, without."""
        if torch.is_grad_enabled():
            return self._make_maps()
        return self._lasting(self._make_maps, device)

    def _make_maps(self) -> tuple[SineMap, SineMap]:
        d, r = self.head_dim, self.feature_dim
        gain, offset = self._lambda_offset()
        gain = gain * self._mean_over**-0.5
        noisy = self.num_realizations is not None
        if self.scale == "matched":
            scale = (r * d) ** -0.25 if noisy else (r / d) ** 0.25
        else:
            scale = r**-0.5 if noisy else 1.0
        dtype = torch.promote_types(self._sines().freqs.dtype, torch.float32)
        gate = None
        if self.gated:
            root, gate = gate_roots(self.gate)
            gate, gain = gate * scale, gain * root[..., None]
        for_k = SineMap(
            # float64: at position 10^6 rounding to float32 would move the phase by 4 % of a turn
            freq=self._sines().freqs.double().sigmoid() / 2,
            offset=None,
            gain=gain * scale,
            gate=gate,
            noise=self._noise(dtype) if noisy else None,
            pool=self.pool,
        )
        return for_k._replace(offset=offset), for_k

    def _noise_source(self) -> SineEncoding:
        return self._sines()

    def _draw(self, dtype: torch.dtype) -> Tensor:  # [H, D, J, R], the gate's noise in the last row
        seed, step = self.noise_key
        h, d, r = self.num_heads, self.head_dim, self.num_realizations

        def draw(module_id: int, kind: int, rows: int) -> Tensor:
            z = philox_normal(seed, step, module_id, kind, (h * d, rows, r), dtype)
            return z.view(h, d, rows, r)

        source, orthogonal = self._sines(), self.noise == "orthogonal"
        z = draw(source.module_id, SINE, 2 * self.num_sines)
        if self.gated:
            # columns are orthogonal over rows and gate together, so shares use one gate noise
            gate = draw((source if orthogonal else self).module_id, GATE, 1)
            z = torch.cat((z, gate), dim=2)
        return _orthogonal(z) if orthogonal else z

    def power(self, side: str) -> Tensor:
        """Return the mean square of codes in units of C, [H, D], float64; side is "q" or "k"."""
        gain = self._lambda_offset()[0].detach().cpu()
        p = (gain**2).sum(-1) / self._mean_over
        if self.gated:
            g = self.gate.detach().cpu().double().sigmoid()
            p = (1 - g) * p + g
        return p

    def kernel(self, positions_q: Tensor, positions_k: Tensor | None = None) -> Tensor:
        """Return C, [..., H, D, D], diagonal unless features are pooled.

        C_d = (1 - g_d) sum_k lambda^2 cos(2 pi f . (s_m - s_n) + theta) / N + g_d, with N = 2K in
        SPE and K in F-StrIPE without noise. Pooled features mix components: entry (d, e) is
        sum_k lambda_dk lambda_ek cos(phase_dk(s_m) - phase_ek(s_n)) / K.
        """
        gain, offset = (None if x is None else x.detach().cpu() for x in self._lambda_offset())
        freq = self._sines().freqs.detach().cpu().double().sigmoid() / 2
        positions_q, positions_k = self._levels(positions_q), self._levels(positions_k)
        turn = 2 * math.pi
        shift = 0 if offset is None else turn * offset
        if self.num_realizations is None and self.pool:
            q = turn * torch.tensordot(positions_q, freq, dims=([-1], [-1])) + shift
            k = turn * torch.tensordot(positions_k, freq, dims=([-1], [-1]))
            angle = q[..., :, None, :] - k[..., None, :, :]  # [..., H, D, D, K]
            return (gain[:, :, None] * gain[:, None] * angle.cos()).sum(-1) / self._mean_over
        lag = positions_q - positions_k
        angle = turn * torch.tensordot(lag, freq, dims=([-1], [-1])) + shift
        c = (gain**2 * angle.cos()).sum(-1) / self._mean_over  # [..., H, D]
        if self.gated:
            g = self.gate.detach().cpu().double().sigmoid()
            c = (1 - g) * c + g
        return torch.diag_embed(c)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"{self.head_dim}, {self.num_heads}, num_levels={self.num_levels}, "
            f"num_sines={self.num_sines}, num_realizations={self.num_realizations}, "
            f"pool={self.pool}, gated={self.gated}, resample={self.resample!r}, "
            f"noise={self.noise!r}, scale={self.scale!r}"
        )


def gate_roots(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(1 - g) and sqrt(g) of g = sigmoid(gate), float64.

    Through logarithms: their slopes stay finite when g saturates.
    """
    gate = gate.double()
    return (F.logsigmoid(-gate) / 2).exp(), (F.logsigmoid(gate) / 2).exp()


def _is_frequency(f: object) -> bool:
    return isinstance(f, (int, float)) and 0 < f < 0.5


def _raw_frequencies(frequency: float | Sequence[float] | None, num_levels: int) -> list[float]:
    # the mean of freqs at each level: the logit of twice the frequency
    if frequency is None:
        return [-4.0] * num_levels
    each = [frequency] * num_levels if isinstance(frequency, (int, float)) else list(frequency)
    if len(each) != num_levels or not all(_is_frequency(f) for f in each):
        raise ValueError(
            "frequency must be between 0 and 1/2, one number or one for each of num_levels = "
            f"{num_levels}, got {frequency!r}"
        )
    return [-math.log(0.5 / f - 1) for f in each]


def _orthogonal(z: Tensor) -> Tensor:  # from Gaussian [H, D, J, R], the same shape
    rows = z.flatten(1, 2).double()
    return (rows.shape[1] ** 0.5 * frames(rows)).to(z.dtype).view_as(z)
