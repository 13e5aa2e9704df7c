"""Causal attention with FAVOR+, whose features are measured from their running maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference.sine_features import spread
from ..backends.specs import ScanOptions
from ..ops.causal_dot import causal_dot
from ..ops.register import observed
from .log_scan import State, divided, log_scan

# features up to e^40 times the first key's: sums over 10^6 tokens stay finite in float32, and
# underflow below e^-87 is lost beside a denominator of at least 1
_GROWTH = 40.0


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
    num, den, state = log_scan(a, b, spread(v, a.shape[2]), state, chunk_size)
    return divided(num, den), *state


def _first(b: Tensor, state: State | None) -> Tensor:
    """Return the running maximum at the first token, [B, H, R]."""
    first = b[:, 0].detach()
    return first if state is None else torch.maximum(state[2].detach(), first)


def _level(b: Tensor, state: State | None, backend: str) -> bool:
    """Return whether all features stay below e^40 times the first token's; a masked one fails."""
    # reading values would synchronise with a GPU and cannot be compiled
    if backend == "reference" or b.device.type != "cpu" or observed() or not b.numel():
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
    options = ScanOptions.of_features("sum", 0.0, chunk_size, backend)
    before = (None, None)
    if state is not None:
        decay = (state[2].detach() - c0).exp()
        before = state[0] * decay[..., None], state[1] * decay
    o, s, z = causal_dot(phi, psi, v, *before, None, None, None, options=options)
    growth = b.detach().amax(1).clamp(min=0)
    decay = (-growth).exp()
    return o, s * decay[..., None], z * decay, c0 + growth
