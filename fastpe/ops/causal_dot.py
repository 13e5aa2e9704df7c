"""The scan: features, causal linear attention and normaliser of q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.specs import Rotation, ScanOptions, SineMap, compute_dtype, state_heads
from .register import differentiable, direct


def _fake(tensors, options):
    q, k, v, _, _, _, freq, ranges = tensors
    b, t, h, d = q.shape
    sequences = b if ranges is None else ranges.shape[0]
    states = state_heads(h, k.shape[2], v.shape[2], 0 if freq is None else freq.shape[0])
    r, rz = options.widths(d)
    dtype, e = compute_dtype(q), v.shape[-1]
    return (
        v.new_empty((b, t, h, e)),
        q.new_empty((b, h, t if rz else 0), dtype=dtype),
        q.new_empty((sequences, states, r, e), dtype=dtype),
        q.new_empty((sequences, states, rz), dtype=dtype),
    )


def _forward(tensors, options):
    return backends.load(options.backend).causal_dot(*tensors, options)


def _backward(grads, tensors, options, saved, needs):
    grad_o, grad_s, grad_z = grads
    if grad_o is None:
        grad_o = torch.zeros_like(saved[0])
    *before, positions, freq, ranges = tensors
    alone = grad_s is None and grad_z is None and before[3] is None
    if alone and needs[6] and options.relative:
        positions = positions - positions[:, :1]
    grads, tensors = (grad_o, grad_s, grad_z), (*before, positions, freq, ranges)
    return backends.load(options.backend).causal_dot_backward(
        grads, tensors, options, *saved, needs
    )


#: o_m = sum_{n<=m} (phi_m . psi_n) v_n, normalised, with the state before and after.
#:
#: q is [B, T, H, D]; k and v have a divisor of H heads each, which neighbours of q's heads share.
#: With ranges, int64 [S, 2], B is 1 and sequence i has the tokens from the first number of row i
#: to before the second; there are S states, and tokens of no sequence get zeros. Returns
#: o [B, T, H, E] and the final state s [S, Hs, R, E], z [S, Hs, Rz].
CausalDot = differentiable(
    "causal_dot",
    tensors="q k v s0? z0? positions? freq? ranges?",
    options=ScanOptions,
    outputs="o _den s z",
    learned="q k v s0 z0 positions freq",
    saved="o _den",
    fake=_fake,
    forward=_forward,
    backward=_backward,
)


def causal_dot(
    *tensors: Tensor | None, options: ScanOptions, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `CausalDot`, without its bookkeeping if nothing is recorded.

    Args:
        tensors: q, k, v, s0, z0, positions, freq, ranges.
        options: How features and weights are made, and the backend.
        padding: [B, T], True at padding; only for a backend in PyTorch, whose outputs are 0 there.
    """
    if options.backend in backends.IN_PYTORCH:
        o, _, s, z = reference.causal_dot(*tensors, options, padding=padding)
    elif direct(tensors):
        o, _, s, z = backends.load(options.backend).causal_dot(*tensors, options, save=False)
    else:
        o, s, z = CausalDot.apply(*tensors, options)
    return o, s, z


def step(
    *tensors: Tensor | None,
    positions: Tensor | None,
    maps: tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | None,
    options: ScanOptions,
    lost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return o, s, z and lost of one token after a state, by one call of the backend.

    None if something is recorded, or if the backend makes features and attends in several calls.

    Args:
        tensors: q, k, v, s0 and z0.
        positions: [B or 1, 1, L], if there are maps.
        maps: Position maps of q and k.
        options: As in `causal_dot`.
        lost: The part of s0 and z0 that float32 rounded off, [S, Hs, R E + Rz]; default nothing.
    """
    of_maps = [] if maps is None else [x for x in (*maps[0], *maps[1]) if isinstance(x, Tensor)]
    if not direct((*tensors, lost, positions, *of_maps)):
        return None
    backend = backends.load(options.backend)
    if not hasattr(backend, "step"):
        return None
    return backend.step(*tensors, positions, maps, options, lost)
