"""The route of FAVOR+, whose features are measured from their running maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._torch import observed
from ..backends.reference import spread
from ..backends.specs import ScanOptions, compute_dtype
from ..backends.tensors import blank
from ..encodings.base import PositionalEncoding
from ..feature_maps.favor import Favor
from ..ops.causal_dot import causal_dot
from . import log_scan
from .call import Setting, Sums
from .encode import apply_custom
from .log_scan import State, divided
from .packing import Packing, one_by_one

# features up to e^40 times the first key's: sums over 10^6 tokens stay finite in float32, and
# underflow below e^-87 is lost beside a denominator of at least 1
_GROWTH = 40.0


def kernel_sizes(
    q: Tensor, v: Tensor, encoding: PositionalEncoding | None, feature_map: Favor
) -> tuple[torch.dtype, tuple[int, int, int]]:
    """Return the dtype that the kernels receive, and the largest D, R and E."""
    d, e = q.shape[-1], v.shape[-1]
    r = d if encoding is None else encoding.feature_dim
    out = feature_map.feature_dim(r)
    # features of exact sines are projected as they are made
    made = 0 if encoding is not None and encoding.exact else r
    return compute_dtype(q), (max(d, out, made), out, e)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, Sums]:
    """Return o and the final state of causal self-attention, as `linear.attend`."""
    if packing.cu_seqlens is not None:
        return one_by_one(attend, q, k, v, positions, state, setting, packing.cu_seqlens)
    dtype, padding = v.dtype, packing.padding
    q, k, v = (blank(x.to(compute_dtype(x)), padding) for x in (q, k, v))
    # a factor that all features of a query have in common cancels
    a, _ = _exponents(q, positions, "q", setting)
    b = _keys(k, positions, setting, padding, q.shape[2])
    sums = None if state is None else state[:3]
    o, *sums = favor_attention(a, b, v, sums, setting.chunk_size, setting.backend)
    return blank(o, padding).to(dtype), Sums(*sums)


def absorb(
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    padding: Tensor | None,
    heads: int,
) -> Sums:
    """Return the state after keys and values that no query looks at, as `linear.absorb`."""
    k, v = (blank(x.to(compute_dtype(x)), padding) for x in (k, v))
    b = _keys(k, positions, setting, padding, heads)
    return Sums(*log_scan.absorb(b, spread(v, heads), None if state is None else state[:3]))


def readout(
    q: Tensor,
    positions: Tensor | None,
    state: Sums,
    setting: Setting,
    padding: Tensor | None = None,
) -> Tensor:
    """Return the outputs of queries that see a state alone, as `linear.readout`."""
    q = blank(q.to(compute_dtype(q)), padding)
    a, _ = _exponents(q, positions, "q", setting)
    return blank(log_scan.readout(a, state[:3]), padding)


def _exponents(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the logarithms of features in two parts, as `Favor.exponents`."""
    x, position_map = apply_custom(x, positions, side, setting)
    return setting.feature_map.exponents(x, positions, position_map, setting.backend)


def _keys(
    k: Tensor, positions: Tensor | None, setting: Setting, padding: Tensor | None, heads: int
) -> Tensor:
    """Return the logarithms of the features of keys for all heads, -inf at padding."""
    exponent, half_square = _exponents(spread(k, heads), positions, "k", setting)
    b = exponent - half_square
    return b if padding is None else b.masked_fill(padding[..., None, None], -torch.inf)


def favor_attention(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    state: State | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o and the final s, z and c, from a backend's scan if features allow, else `log_scan`.

    Arguments are those of `log_scan`, but a may lack a constant for each query, and v may be
    [B, T, Hk, E] where Hk divides H. All have one dtype.
    """
    if _level(b, state, backend):
        return _level_scan(a, b, v, state, chunk_size, backend)
    num, den, state = log_scan.log_scan(a, b, spread(v, a.shape[2]), state, chunk_size)
    return divided(num, den), *state


def _first(b: Tensor, state: State | None) -> Tensor:
    """Return the running maximum at the first token, [B, H, R]."""
    first = b[:, 0].detach()
    return first if state is None else torch.maximum(state[2].detach(), first)


def _level(b: Tensor, state: State | None, backend: str) -> bool:
    """Return whether all features stay below e^40 times the first token's.

    False also if the first token of a sequence is masked: its logarithms are -inf.
    """
    # reading values would synchronise with a GPU and cannot be compiled
    if backend in backends.IN_PYTORCH or b.device.type != "cpu" or observed() or not b.numel():
        return False
    return bool((b.detach().amax(1) - _first(b, state)).max() < _GROWTH)


def _level_scan(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    state: State | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `favor_attention` with all features measured from the first token's."""
    c0 = _first(b, state)
    a, b = a + c0[:, None], b - c0[:, None]
    phi, psi = (a - a.detach().amax(-1, keepdim=True)).exp(), b.exp()
    options = ScanOptions(normalize="sum", chunk=chunk_size or 0, backend=backend)
    before = (None, None)
    if state is not None:
        decay = (state[2].detach() - c0).exp()
        before = state[0] * decay[..., None], state[1] * decay
    o, s, z = causal_dot(phi, psi, v, *before, None, None, None, options=options)
    growth = b.detach().amax(1).clamp(min=0)
    decay = (-growth).exp()
    return o, s * decay[..., None], z * decay, c0 + growth
