"""Banded attention: exact ConvSPE for the linear kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import shape
from ..backends import reference
from ..backends.specs import ScanOptions, compute_dtype
from ..encodings.base import PositionalEncoding
from ..ops import banded as ops
from ..ops.causal_dot import causal_dot
from .call import Setting, Sums
from .packing import Packing, one_by_one
from .validation import check_inputs, check_options


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

    o_m = sum_{0 <= m-n < kappa} w_mn v_n with w_mn = sum_d q_md k_nd P_d(m - n). This is the
    expectation of ConvSPE (arXiv 2105.08399) without a gate, for the linear kernel. Arithmetic is
    float32, or float64 for float64 inputs.

    Args:
        q: Queries, [B, T, H, D]; float32, float64, bfloat16 or float16.
        k: Keys, [B, T, H, D].
        v: Values, [B, T, H, E].
        weight_kernel: P for lags 0 .. kappa - 1, [H, D, kappa].
        normalize: "abs" divides by max(|sum of weights|, eps); False does not divide.
        eps: Smallest divisor with "abs".
        initial_state: The kappa - 1 keys and values before these, [B, kappa - 1, H, D] and
            [B, kappa - 1, H, E], with zeros for missing ones.
        output_final_state: True also returns the last kappa - 1 keys and values.
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
            f"weight_kernel must have at least one lag and be on {q.device}, got {shape(kernel)} "
            f"on {kernel.device}"
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
    """Return the sums of w v [B, T, H, E] and of w [B, T, H], and the last keys and values."""
    before = kernel.shape[-1] - 1
    if state is None:
        k, v = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in (k, v))
    else:
        k, v = (torch.cat((w.to(x.dtype), x), 1) for w, x in zip(state, (k, v), strict=True))
    # one more value of 1 adds up the weights; padded keys of 0 have weight 0
    y = ops.banded(q, k, F.pad(v, (0, 1), value=1.0), kernel.to(q.dtype))
    last = slice(k.shape[1] - before, None)
    return y[..., :-1], y[..., -1], (k[:, last], v[:, last])


def kernel_sizes(
    q: Tensor, v: Tensor, encoding: PositionalEncoding, feature_map: str
) -> tuple[torch.dtype, tuple[int, int, int]]:
    """Return the dtype that the kernels receive, and the largest D, R and E."""
    # the scan of the gate, which adds up weights as one more value
    return compute_dtype(q), (q.shape[-1], q.shape[-1], v.shape[-1] + 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, Sums]:
    """Return o and the final state of causal self-attention, as `linear.attend`.

    s [B, H, (D +) kappa - 1, E] holds the gate's state, then the last values;
    z [B, H, (D +) (kappa - 1) D] holds the gate's sum of keys, then the last keys.
    """
    if packing.padding is not None:
        return _without_padding(q, k, v, state, setting, packing.padding)
    if packing.cu_seqlens is not None:
        return one_by_one(attend, q, k, v, None, state, setting, packing.cu_seqlens)
    band, dtype = setting.maps[0], v.dtype
    q, k, v = (reference.spread(x.to(compute_dtype(x)), q.shape[2]) for x in (q, k, v))
    rows = 0 if band.gate is None else q.shape[-1]
    window = gate_state = None
    if state is not None:
        s, z = state[:2]
        last_k = z[..., rows:].unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
        window = last_k, s[:, :, rows:].transpose(1, 2)
        gate_state = torch.cat((s[:, :, :rows], z[..., :rows, None]), -1)
    num, den, (last_k, last_v) = _weigh(q, k, v, band.kernel, window)
    s, z = last_v.transpose(1, 2), last_k.transpose(1, 2).flatten(2)
    if band.gate is not None:
        gate, ones = band.gate.to(q.dtype), F.pad(v, (0, 1), value=1.0)
        options = ScanOptions(chunk=setting.chunk_size or 0, backend=setting.backend)
        none = None if gate_state is None else q.new_empty((q.shape[0], q.shape[2], 0))
        before = gate_state, none, None, None, None
        o, sums, _ = causal_dot(q * gate, k * gate, ones, *before, options=options)
        num, den = num + o[..., :-1], den + o[..., -1]
        s, z = torch.cat((sums[..., :-1], s), 2), torch.cat((sums[..., -1], z), 2)
    return reference.normalized(num, den, setting.normalize, setting.eps).to(dtype), Sums(s, z)


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, state: Sums | None, setting: Setting, padding: Tensor
) -> tuple[Tensor, Sums]:
    # packed, by a look at where the padding is
    kept = ~padding
    bounds = F.pad(kept.sum(1).cumsum(0), (1, 0))
    packed = (x[kept][None] for x in (q, k, v))
    o, sums = attend(*packed, None, state, setting, Packing(cu_seqlens=bounds))
    empty = o.new_zeros(*padding.shape, *o.shape[2:])
    return empty.masked_scatter(kept[..., None, None], o), sums


def absorb(k: Tensor, v: Tensor, positions: Tensor | None, *args: object) -> Sums:
    """Raise ValueError: there are no features to make a state of."""
    raise ValueError(
        "pos_encoding must have features here, to attend both ways or to other tokens, got ConvSPE "
        "with num_realizations=None"
    )


readout = absorb
