"""Rotary encodings: RoPE and RoPEPool."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._checks import check_positive
from .._torch import observed
from ..backends.specs import Rotation
from .base import PositionalEncoding
from .sharded import put


class RoPE(PositionalEncoding):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) for linear attention.

    Pair i of a query or key turns by theta_i times the position, theta_i = base^(-2i/rotary_dim).
    apply="after" rotates psi(q) and psi(k) in the numerator only (eq. 19): the normaliser stays
    positive, but weights may be negative and do not sum to 1. apply="before" rotates q and k before
    psi: weights are positive and sum to 1, but they are relative only if psi's kernel depends on
    inner products alone.

    Args:
        head_dim: Size D of queries and keys, even.
        num_heads: H; needed with per_head.
        base: Base of the geometric frequencies.
        rotary_dim: Number of leading components to rotate, even; default all.
        interleaved: True pairs (2i, 2i + 1) as in RoFormer, False (i, i + rotary_dim / 2) as in
            GPT-NeoX. The two differ by a permutation of the components.
        learned: True makes theta a parameter, [H or 1, rotary_dim / 2, L], radians per unit of
            position.
        per_head: True gives each head its own frequencies, initially
            base^(-2(i + h/H)/rotary_dim).
        num_levels: Components L of a position. The angle is theta_i . position, with theta_i / L
            for each level initially. L > 1 needs learned=True: with equal frequencies only the
            sum of the components would matter.
        apply: "after" or "before" the feature map.

    Raises:
        ValueError: an odd head_dim or rotary_dim, per_head without num_heads, num_levels > 1
            without learned, or another argument that is not as above.
    """

    _pool, _scale = False, 1.0

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = True,
        learned: bool = False,
        per_head: bool = False,
        num_levels: int = 1,
        apply: str = "after",
    ) -> None:
        super().__init__(head_dim, num_heads, num_levels)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if head_dim % 2:
            raise ValueError(f"head_dim must be even to form pairs, got {head_dim}")
        check_positive("rotary_dim", rotary_dim)
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be even and in 2..{head_dim}, got {rotary_dim}")
        if per_head and num_heads is None:
            raise ValueError(
                "num_heads must be given with per_head=True, got None: give it, or set "
                "per_head=False to share frequencies"
            )
        if num_levels > 1 and not learned:
            raise ValueError(
                f"learned must be True with num_levels = {num_levels}, as fixed frequencies are "
                "the same at every level, got False"
            )
        if apply not in ("after", "before"):
            raise ValueError(f"apply must be 'after' or 'before', got {apply!r}")
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not base > 0:
            raise ValueError(f"base must be a positive number, got {base!r}")
        self.base, self.rotary_dim, self.interleaved = base, rotary_dim, interleaved
        self.learned, self.per_head, self.apply_order = learned, per_head, apply
        # fixed frequencies by device; not a buffer, since `module.bfloat16()` would round them
        self._cycles: dict[torch.device, Tensor] = {}
        if learned:
            heads = num_heads if per_head else 1
            self.theta = nn.Parameter(torch.empty(heads, rotary_dim // 2, num_levels))
            self.reset_parameters()
        self._fill()

    def reset_parameters(self) -> None:
        """Set learned frequencies to the geometric ones."""
        if self.learned:
            put(self.theta, self._geometric())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoPE:
        super()._apply(fn, recurse)
        self._fill(fn(torch.empty(0, device="cpu")).device)
        return self

    def _fill(self, device: torch.device | None = None) -> None:
        # before compilation, whose graph would otherwise compute the table at each call
        if not self.learned:
            self.frequencies(device)

    def _geometric(self) -> Tensor:
        # initial theta, [H or 1, rotary_dim / 2, L], float64 on the CPU
        heads = self.num_heads if self.per_head else 1
        pair = torch.arange(self.rotary_dim // 2, dtype=torch.float64, device="cpu")
        shift = torch.arange(heads, dtype=torch.float64, device="cpu")[:, None] / heads
        theta = self.base ** (-2 * (pair + shift) / self.rotary_dim) / self.num_levels
        return theta[..., None].repeat(1, 1, self.num_levels)

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_cycles": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._fill()

    @property
    def feature_dim(self) -> int:
        """R = D."""
        return self.head_dim

    @property
    def norm_dim(self) -> int:
        """D for unrotated features; with apply="before" feature_dim."""
        return self.head_dim if self.apply_order == "after" else self.feature_dim

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Return theta / 2 pi in cycles, [H or 1, rotary_dim / 2, L], float64, on a device."""
        if self.learned:
            return self.theta.double() / (2 * math.pi)
        device = torch.device("cpu") if device is None else device
        table = self._cycles.get(device)
        if table is not None:
            return table
        # leave inference mode: an inference tensor cannot be saved for a backward
        if observed():
            table = self._cycles_on(device)
            kept = torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()
        else:
            with torch.inference_mode(False), torch.no_grad():
                table, kept = self._cycles_on(device), True
        if kept:
            self._cycles[device] = table
        return table

    def _cycles_on(self, device: torch.device) -> Tensor:
        table = self._cycles.get(torch.device("cpu"))
        return (self._geometric() / (2 * math.pi) if table is None else table).to(device)

    def map_inputs(self) -> list[Tensor]:
        """Return theta if it is learned."""
        return [self.theta] if self.learned else []

    def make_maps(self, device: torch.device | None = None) -> tuple[Rotation, Rotation]:
        """Return the rotation for both sides."""
        rotation = Rotation(
            freq=self.frequencies(device),
            interleaved=self.interleaved,
            pool=self._pool,
            map_first=self.apply_order == "after",
            scale=self._scale,
        )
        return rotation, rotation

    def kernel(self, positions_q: Tensor, positions_k: Tensor | None = None) -> Tensor:
        """Return the rotation by the lag (arXiv 2504.05364, eq. 14), [..., H or 1, D, D]."""
        freq = self.frequencies().cpu()
        lag = self._levels(positions_q) - self._levels(positions_k)
        angle = 2 * math.pi * torch.tensordot(lag, freq, dims=([-1], [-1]))
        cos, sin = angle.cos(), angle.sin()
        return self._blocks(cos, sin, -sin, cos)

    def _blocks(self, c11: Tensor, c12: Tensor, c21: Tensor, c22: Tensor) -> Tensor:
        # from entries [..., H, W] of each pair's 2 x 2 block to [..., H, D, D]
        width = self.rotary_dim // 2
        i = torch.arange(width)
        first, second = (2 * i, 2 * i + 1) if self.interleaved else (i, i + width)
        out = torch.diag(torch.arange(self.head_dim) >= self.rotary_dim).double()
        out = out.expand(*c11.shape[:-1], -1, -1).clone()
        out[..., first, first], out[..., first, second] = c11, c12
        out[..., second, first], out[..., second, second] = c21, c22
        return out

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"{self.head_dim}, num_heads={self.num_heads}, base={self.base}, "
            f"rotary_dim={self.rotary_dim}, interleaved={self.interleaved}, "
            f"learned={self.learned}, per_head={self.per_head}, num_levels={self.num_levels}, "
            f"apply={self.apply_order!r}"
        )


class RoPEPool(RoPE):
    """RoPE that adds the two rotated components of each pair (arXiv 2504.05364, section III.D).

    It has half the features of RoPE, so half the state and half the cost. It is not shift
    invariant: products of features also depend on the sum of two positions (eq. 23), so give a
    packed or resumed sequence its exact positions.

    Arguments are those of `RoPE` without rotary_dim, and so are errors. By default each head learns
    its own theta.

    Args:
        scale: "matched" multiplies the features by (R / D)^(1/4) (`PositionalEncoding.kernel`),
            "paper" does not. With apply="after" the factor scales the output, because the
            normaliser lacks it.
    """

    _pool = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        learned: bool = True,
        per_head: bool = True,
        num_levels: int = 1,
        apply: str = "after",
        scale: str = "matched",
    ) -> None:
        super().__init__(
            head_dim,
            num_heads,
            base=base,
            interleaved=interleaved,
            learned=learned,
            per_head=per_head,
            num_levels=num_levels,
            apply=apply,
        )
        if scale not in ("matched", "paper"):
            raise ValueError(f"scale must be 'matched' or 'paper', got {scale!r}")
        self.scale = scale

    @property
    def _scale(self) -> float:
        return 0.5**0.25 if self.scale == "matched" else 1.0

    @property
    def feature_dim(self) -> int:
        """R = D / 2."""
        return self.head_dim // 2

    def kernel(self, positions_q: Tensor, positions_k: Tensor | None = None) -> Tensor:
        """Return C with q^T C k equal to arXiv 2504.05364, eq. 23, [..., H or 1, D, D]."""
        freq = self.frequencies().cpu()
        positions_q, positions_k = self._levels(positions_q), self._levels(positions_k)
        turn = 2 * math.pi
        minus = turn * torch.tensordot(positions_q - positions_k, freq, dims=([-1], [-1]))
        plus = turn * torch.tensordot(positions_q + positions_k, freq, dims=([-1], [-1]))
        return self._blocks(
            minus.cos() + plus.sin(),
            minus.sin() + plus.cos(),
            plus.cos() - minus.sin(),
            minus.cos() - plus.sin(),
        )

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{super().extra_repr()}, scale={self.scale!r}"
