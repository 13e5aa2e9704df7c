"""Attention to the last kappa keys, by content and lag.

Time grows as T kappa and memory as T, because weights exist for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .register import differentiable, direct

# numbers in a temporary, few enough for a CPU's cache
_ROOM = 2**18


def _windows(x: Tensor, tile: slice, size: int) -> Tensor:  # [B, n, size, H, .]
    # a view: windows overlap
    return x[:, tile.start : tile.stop + size - 1].unfold(1, size, 1).movedim(-1, 2)


def _tiles(q: Tensor, kernel: Tensor) -> list[slice]:
    b, t, h, d = q.shape
    step = max(_ROOM // max(b * h * d * kernel.shape[-1], 1), 1)
    return [slice(i, min(i + step, t)) for i in range(0, t, step)]


def _by_age(kernel: Tensor) -> Tensor:  # [H, D, kappa] -> [kappa, H, D], the largest lag first
    return kernel.flip(-1).permute(2, 0, 1).contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
    taps, p = kernel.shape[-1], _by_age(kernel)
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    for tile in _tiles(q, kernel):
        keys, values = _windows(k, tile, taps), _windows(v, tile, taps)
        weight = (q[:, tile, None] * keys * p).sum(-1, keepdim=True)
        o[:, tile] = (weight * values).sum(2)
    return o


def _backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    taps, p = kernel.shape[-1], _by_age(kernel)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dp = torch.zeros_like(p, dtype=torch.float64)
    for tile in _tiles(q, kernel):
        keys, values = _windows(k, tile, taps), _windows(v, tile, taps)
        query, grad = q[:, tile, None], grad_o[:, tile, None]
        product = query * keys
        weight = (product * p).sum(-1, keepdim=True)
        dweight = (grad * values).sum(-1, keepdim=True)  # [B, n, kappa, H, 1]
        dp += (dweight * product).sum((0, 1))
        part = dweight * p
        dq[:, tile] = (part * keys).sum(2)
        # windows overlap: add one query at a time
        by_k, by_v = part * query, weight * grad
        for i in range(tile.stop - tile.start):
            window = slice(tile.start + i, tile.start + i + taps)
            dk[:, window] += by_k[:, i]
            dv[:, window] += by_v[:, i]
    grads = dq, dk, dv, dp.permute(1, 2, 0).flip(-1).to(kernel.dtype).contiguous()
    return tuple(g if need else q.new_empty(0) for g, need in zip(grads, needs, strict=True))


class NoOptions(NamedTuple):
    """No arguments but tensors."""


#: o_m = sum_{n=m..m+kappa-1} (sum_d q_md k_nd kernel_d[m + kappa - 1 - n]) v_n, [B, T, H, E]; keys
#: and values begin kappa - 1 tokens before the queries. The gradient computes weights again.
Banded = differentiable(
    "banded",
    tensors="q k v kernel",
    options=NoOptions,
    outputs="o",
    learned="q k v kernel",
    fake=lambda tensors, _: tensors[0].new_empty((*tensors[0].shape[:-1], tensors[2].shape[-1])),
    forward=lambda tensors, _: _forward(*tensors),
    backward=lambda grads, tensors, options, saved, needs: _backward(*grads, *tensors, needs),
)


def banded(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
    """Apply `Banded`, without its bookkeeping if nothing is recorded.

    Args:
        q: Queries, [B, T, H, D].
        k: Keys, [B, T + kappa - 1, H, D].
        v: Values, [B, T + kappa - 1, H, E].
        kernel: Weights of lags 0 .. kappa - 1, [H, D, kappa].
    """
    if direct((q, k, v, kernel)):
        return _forward(q, k, v, kernel)
    return Banded.apply(q, k, v, kernel, NoOptions())
