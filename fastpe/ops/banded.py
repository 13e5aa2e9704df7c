"""Attention to the last kappa keys, by content and lag.

Time grows as T kappa and memory as T, because weights exist for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .register import first_order, operator

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


@operator(
    "banded(Tensor q, Tensor k, Tensor v, Tensor kernel) -> Tensor",
    lambda q, k, v, kernel: q.new_empty((*q.shape[:-1], v.shape[-1])),
)
def _banded(q, k, v, kernel):
    return _forward(q, k, v, kernel)


def _backward_fake(grad_o, *rest):
    *inputs, needs = rest
    return tuple(
        torch.empty_like(i, memory_format=torch.contiguous_format) if need else i.new_empty(0)
        for i, need in zip(inputs, needs, strict=True)
    )


@operator(
    "banded_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor kernel, bool[] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dkernel)",
    _backward_fake,
)
def _banded_backward(*args):
    return _backward(*args)


class Banded(torch.autograd.Function):
    """o_m = sum_{n=m..m+kappa-1} (sum_d q_md k_nd kernel_d[m + kappa - 1 - n]) v_n."""

    @staticmethod
    def forward(ctx, q, k, v, kernel):
        """Return o [B, T, H, E]; keys and values begin kappa - 1 tokens before queries."""
        ctx.save_for_backward(q, k, v, kernel)
        return _banded(q, k, v, kernel)

    @staticmethod
    def backward(ctx, grad_o):
        """Return the gradients, from weights computed again."""
        args = (grad_o, *ctx.saved_tensors)
        return tuple(first_order(_banded_backward, args, ctx.needs_input_grad))
