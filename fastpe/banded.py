"""Attention to the last keys only, by content and lag: exact ConvSPE for the linear kernel.

Time is proportional to T kappa, memory to T: weights exist for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .checks import shape
from .maps import Band
from .ops import (
    ScanOptions,
    _first_order,
    _op,
    _plain,
    causal_dot,
    compute_dtype,
    refuse_transforms,
)
from .validation import check_inputs, check_options

# numbers of a temporary, so that it stays in a cache
_ROOM = 2**18


def _windows(x: Tensor, tile: slice, size: int) -> Tensor:  # [B, n, size, H, .]
    # a view: the windows of the queries of a tile overlap
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
        # windows overlap: one query after the other
        by_k, by_v = part * query, weight * grad
        for i in range(tile.stop - tile.start):
            window = slice(tile.start + i, tile.start + i + taps)
            dk[:, window] += by_k[:, i]
            dv[:, window] += by_v[:, i]
    grads = dq, dk, dv, dp.permute(1, 2, 0).flip(-1).to(kernel.dtype).contiguous()
    return tuple(g if need else q.new_empty(0) for g, need in zip(grads, needs, strict=True))


@_op(
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


@_op(
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
        """Return o, [B, T, H, E]; keys and values begin kappa - 1 tokens before the queries."""
        ctx.save_for_backward(q, k, v, kernel)
        return _banded(q, k, v, kernel)

    @staticmethod
    def backward(ctx, grad_o):
        """Return the gradients; weights are computed again."""
        args = (grad_o, *ctx.saved_tensors)
        return tuple(_first_order(_banded_backward, args, ctx.needs_input_grad))


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_kernel: Tensor,
    *,
    normalize: bool | str = False,
    eps: float = 1e-6,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention to the last kappa keys, by content and lag.

    o_m = sum_{0 <= m-n < kappa} w_mn v_n with w_mn = sum_d q_md k_nd P_d(m - n): what ConvSPE
    (arXiv 2105.08399) is in expectation, ungated and for the linear kernel. Arithmetic is float32,
    for float64 inputs float64.

    Args:
        q: Queries, [B, T, H, D]; float32, float64, bfloat16 or float16.
        k: Keys, [B, T, H, D].
        v: Values, [B, T, H, E].
        weight_kernel: P, [H, D, kappa]: of lags 0 .. kappa - 1.
        normalize: "abs" divides by max(|sum of weights|, eps); False does not divide.
        eps: Least magnitude of the sum with "abs".
        initial_state: The kappa - 1 keys and values before these, [B, kappa - 1, H, D] and
            [B, kappa - 1, H, E], zeros where there are none.
        output_final_state: Return the last kappa - 1 keys and values too.
    Returns:
        o: [B, T, H, E] in v's dtype; with output_final_state a pair of o and the state.
    Raises:
        ValueError, TypeError: an argument is not as above.
    """
    check_inputs(q, k, v)
    check_options("identity", normalize, eps, None)
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    b, _, h, d = q.shape
    kernel = weight_kernel
    if not isinstance(kernel, Tensor) or kernel.ndim != 3 or kernel.shape[:2] != (h, d):
        raise ValueError(f"weight_kernel must be [{h}, {d}, kappa], got {shape(kernel)}")
    if kernel.device != q.device or not kernel.shape[-1]:
        raise ValueError(
            f"weight_kernel must be of one lag at least on {q.device}, got {shape(kernel)} on "
            f"{kernel.device}"
        )
    if initial_state is not None:
        wanted = [(b, kernel.shape[-1] - 1, h, x.shape[-1]) for x in (k, v)]
        if [tuple(x.shape) for x in initial_state] != wanted:
            came = ", ".join(map(shape, initial_state))
            raise ValueError(f"initial_state must be of shapes {wanted}, got {came}")
    dtype, (q, k, v) = v.dtype, (x.to(compute_dtype(x)) for x in (q, k, v))
    num, den, state = _weigh(q, k, v, kernel, initial_state)
    o = reference.normalized(num, den, normalize, eps).to(dtype)
    return (o, state) if output_final_state else o


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return sum w v [B, T, H, E], sum w [B, T, H], and the last keys and values."""
    before = kernel.shape[-1] - 1
    if state is None:
        k, v = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in (k, v))
    else:
        k, v = (torch.cat((w.to(x.dtype), x), 1) for w, x in zip(state, (k, v), strict=True))
    # a value of one adds up weights; where there was no key the weight is zero
    args = q, k, F.pad(v, (0, 1), value=1.0), kernel.to(q.dtype)
    if _plain(args):
        y = _forward(*args)
    else:
        refuse_transforms()
        y = Banded.apply(*args)
    last = slice(k.shape[1] - before, None)
    return y[..., :-1], y[..., -1], (k[:, last], v[:, last])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    *,
    normalize: bool | str,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o and the final s and z of attention by a `Band`.

    s [B, H, (D +) kappa - 1, E] has the gate's sum over all keys, then the last values;
    z [B, H, (D +) (kappa - 1) D] the gate's sum of keys, then the last keys.
    """
    dtype, (q, k, v) = v.dtype, (x.to(compute_dtype(x)) for x in (q, k, v))
    rows = 0 if band.gate is None else q.shape[-1]
    window = gate_state = None
    if state is not None:
        s, z = state
        last_k = z[..., rows:].unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
        window = last_k, s[:, :, rows:].transpose(1, 2)
        gate_state = torch.cat((s[:, :, :rows], z[..., :rows, None]), -1)
    num, den, (last_k, last_v) = _weigh(q, k, v, band.kernel, window)
    s, z = last_v.transpose(1, 2), last_k.transpose(1, 2).flatten(2)
    if band.gate is not None:
        gate, ones = band.gate.to(q.dtype), F.pad(v, (0, 1), value=1.0)
        o, sums = _linear(q * gate, k * gate, ones, gate_state, chunk_size, backend)
        num, den = num + o[..., :-1], den + o[..., -1]
        s, z = torch.cat((sums[..., :-1], s), 2), torch.cat((sums[..., -1], z), 2)
    return reference.normalized(num, den, normalize, eps).to(dtype), s, z


def _linear(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, chunk_size: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return causal linear attention without normaliser, and its state."""
    none = q.new_empty((q.shape[0], q.shape[2], 0))
    state = None if s is None else (s, none)
    if backend == "reference":
        options = {"normalize": False, "state": state, "chunk_size": chunk_size}
        o, (s, _) = reference.chunked(q, k, v, q[..., :0], k[..., :0], **options)
        return o, s
    options = ScanOptions.of_features("none", 0.0, chunk_size, backend)
    return causal_dot(q, k, v, *(state or (None, None)), None, None, None, options=options)[:2]
