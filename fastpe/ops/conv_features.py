"""The features of ConvSPE: products with noise filtered around each position.

Noise and codes exist for one tile of positions at a time; the gradient computes them again. Tokens
at one position share a code, and so do sequences that share positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.specs import compute_dtype
from .noise import CONV, philox_normal
from .register import differentiable, direct

# positions of a tile; fixed, so that a code has the same bits in every call
TILE = 64
# tiles whose noise decoding keeps, 25 MB each at H D = 512, R = 64, kappa = 128
_KEPT = 2


class Filter(NamedTuple):
    """The code of position s: sum_j weight[j] Z[s + j] + constant, for each h, d and r.

    Attributes:
        weight: The filter, [H, D, kappa].
        constant: The gate's part, [H, D, R], or None.
        seed: Seed of the noise Z, int64 scalar.
        step: Step of the noise, int64 scalar.
        module: Module id of the noise.
        num_realizations: R.
    """

    weight: Tensor
    constant: Tensor | None
    seed: Tensor
    step: Tensor
    module: int
    num_realizations: int


class KeptNoise:
    """A cache for decoding: the noise of the tiles that the last single tokens stood in."""

    def __init__(self) -> None:
        # key and noise by tile; assigned at once, since other threads read it
        self._known: tuple[tuple, dict[int, Tensor]] = (), {}

    def codes(self, positions: Tensor, fir: Filter, dtype: torch.dtype) -> Tensor:
        """Return the codes [N, H, D, R] of positions [N]."""
        h, d, taps = fir.weight.shape
        key = int(fir.seed), int(fir.step), fir.module, fir.num_realizations, dtype, (h, d, taps)
        key = *key, fir.seed.device
        known, before = self._known
        if known != key:
            before = {}
        tiles, codes, weight = {}, [], fir.weight.to(dtype)
        for position in positions.tolist():
            i, row = divmod(position, TILE)
            noise = tiles.get(i, before.get(i))
            if noise is None:
                with torch.inference_mode(False):
                    noise = _noise(fir, dtype, i * TILE, TILE + taps - 1)
            if len(tiles) < _KEPT:
                tiles[i] = noise
            code = torch.einsum("hdj,hdjr->hdr", weight, noise[:, :, row : row + taps])
            codes.append(code if fir.constant is None else code + fir.constant.to(dtype))
        self._known = key, tiles
        return torch.stack(codes)


def _noise(fir: Filter, dtype: torch.dtype, first: int, rows: int) -> Tensor:  # [H, D, rows, R]
    weight, _, *key, r = fir
    h, d, _ = weight.shape
    return philox_normal(*key, CONV, [h * d, rows, r], dtype, first).unflatten(0, (h, d))


def _one_token(x: Tensor, positions: Tensor, fir: Filter, kept: KeptNoise) -> Tensor:
    places, which = _integers(positions).unique(return_inverse=True)
    dtype = compute_dtype(x)
    code = kept.codes(places, fir, dtype)[which].expand(x.shape[0], -1, -1, -1)
    return torch.einsum("bhd,bhdr->bhr", x[:, 0].to(dtype), code)[:, None].to(x.dtype)


def _integers(positions: Tensor) -> Tensor:  # [N]
    positions = positions.reshape(-1)
    if not torch.equal(positions.long().double(), positions):
        raise ValueError("positions must be integers with ConvSPE, got others")
    return positions.long()


class _Codes:
    """Codes by tile for tokens [G, N, H, .], where G sequences share positions or G = 1."""

    def __init__(self, x: Tensor, positions: Tensor, fir: Filter) -> None:
        b, t = x.shape[:2]
        self.groups = (b, t) if positions.shape[0] == 1 else (1, b * t)
        self.dtype, self.fir = compute_dtype(x), fir
        self.positions = _integers(positions)
        # row c of these Toeplitz matrices is the filter moved by c: [H, D, C, C + kappa - 1]
        weight = F.pad(fir.weight.to(self.dtype), (TILE - 1, TILE - 1))
        self.matrices = weight.unfold(-1, self.window, 1).flip(-2)

    @property
    def window(self) -> int:
        """The rows of noise that a tile reads."""
        return TILE + self.fir.weight.shape[-1] - 1

    def grouped(self, x: Tensor) -> Tensor:
        """Reshape [B, T, H, .] to [G, N, H, .]."""
        return x.reshape(*self.groups, *x.shape[2:])

    def tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield indices of at most TILE tokens of a tile, their rows in it, and its noise."""
        order = self.positions.argsort(stable=True)
        tile = self.positions[order].div(TILE, rounding_mode="floor")
        found, count = (x.tolist() for x in tile.unique_consecutive(return_counts=True))
        noise = None
        for i, at, columns in zip(found, [None, *found], order.split(count), strict=False):
            noise = self._noise(i * TILE, noise if at == i - 1 else None)
            for part in columns.split(TILE):
                yield part, self.positions[part] - i * TILE, noise

    def _noise(self, first: int, before: Tensor | None) -> Tensor:  # [H, D, window, R]
        # the tile before overlaps this one: draw the rest only
        kept = 0 if before is None else self.window - TILE
        new = _noise(self.fir, self.dtype, first + kept, self.window - kept)
        return new if before is None else torch.cat((before[:, :, TILE:], new), 2)

    def code(self, head: int, rows: Tensor, noise: Tensor) -> Tensor:
        """Return the codes [n, D, R] of rows of a tile."""
        operands, constant = (self.matrices[head], noise[head]), self.fir.constant
        if constant is None:
            code = torch.bmm(*operands)
        else:
            code = torch.baddbmm(constant[head, :, None].to(self.dtype), *operands)
        return code.transpose(0, 1).index_select(0, rows)

    def by_token(self, x: Tensor, columns: Tensor, head: int) -> Tensor:
        """Return some tokens of one head, [n, G, .]."""
        return x[:, columns, head].transpose(0, 1).to(self.dtype)


def _forward(x: Tensor, positions: Tensor, fir: Filter) -> Tensor:
    codes = _Codes(x, positions, fir)
    y = x.new_empty((*codes.groups, x.shape[2], fir.num_realizations))
    inputs = codes.grouped(x)
    for columns, rows, noise in codes.tiles():
        for h in range(x.shape[2]):
            code = codes.code(h, rows, noise)
            part = torch.bmm(codes.by_token(inputs, columns, h), code)
            y[:, columns, h] = part.transpose(0, 1).to(y.dtype)
    return y.view(*x.shape[:-1], fir.num_realizations)


def _backward(
    grad_y: Tensor, x: Tensor, positions: Tensor, fir: Filter, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    codes = _Codes(x, positions, fir)
    inputs, grads = codes.grouped(x), codes.grouped(grad_y)
    dx = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    weight, wide = fir.weight, {"dtype": torch.float64}
    dweight = torch.zeros_like(weight, **wide)
    dconstant = dweight.new_zeros((*weight.shape[:2], fir.num_realizations))
    taps = torch.arange(weight.shape[-1], device=x.device)
    for columns, rows, noise in codes.tiles():
        # entry j of the filter multiplied row s + j of the noise
        met = (rows[:, None] + taps).expand(x.shape[-1], -1, -1)
        for h in range(x.shape[2]):
            grad = codes.by_token(grads, columns, h)
            if needs[0]:
                part = torch.bmm(grad, codes.code(h, rows, noise).transpose(1, 2))
                dx[:, columns, h] = part.transpose(0, 1).to(dx.dtype)
            if needs[1] or needs[2]:
                part = codes.by_token(inputs, columns, h)
                dcode = torch.bmm(part.transpose(1, 2), grad).transpose(0, 1)  # [D, n, R]
                dconstant[h] += dcode.sum(1)
                by_row = torch.bmm(dcode, noise[h].transpose(1, 2))
                dweight[h] += by_row.gather(2, met).sum(1)
    found = dx.reshape(x.shape), dweight.to(weight.dtype), dconstant
    if fir.constant is not None:
        found = *found[:2], dconstant.to(fir.constant.dtype)
    return tuple(g if need else x.new_empty(0) for g, need in zip(found, needs, strict=True))


class ConvOptions(NamedTuple):
    """The arguments of the operator that are no tensors."""

    module: int
    num_realizations: int


#: Features of ConvSPE, [B, T, H, R], whose codes are made again for the gradient.
ConvFeatures = differentiable(
    "conv_features",
    tensors="x positions weight constant? seed step",
    options=ConvOptions,
    outputs="y",
    learned="x weight constant",
    fake=lambda tensors, options: tensors[0].new_empty(
        (*tensors[0].shape[:-1], options.num_realizations)
    ),
    forward=lambda tensors, options: _forward(*tensors[:2], Filter(*tensors[2:], *options)),
    backward=lambda grads, tensors, options, saved, needs: _backward(
        *grads, *tensors[:2], Filter(*tensors[2:], *options), needs
    ),
)


def conv_features(x: Tensor, positions: Tensor, fir: Filter, kept: KeptNoise) -> Tensor:
    """Return y[h, r] = sum_d x[h, d] code[h, d, r] with the code of the token's position.

    Args:
        x: Queries or keys, [B, T, H, D].
        positions: Integers of either sign, in any order; [B or 1, T, 1], float64.
        fir: The filter and noise of the codes.
        kept: A cache of noise for decoding.
    Returns:
        [B, T, H, R] in the dtype of x.
    Raises:
        ValueError: a position is not an integer.
    """
    if direct((x, positions, fir.weight, fir.constant)):
        if x.shape[1] == 1 and x.shape[0]:
            return _one_token(x, positions, fir, kept)
        return _forward(x, positions, fir)
    return ConvFeatures.apply(x, positions, *fir[:4], ConvOptions(*fir[4:]))
