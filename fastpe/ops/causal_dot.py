"""The scan: features, causal linear attention and normaliser of q, k, v."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.specs import Rotation, ScanOptions, SineMap, compute_dtype, state_heads
from .register import first_order, operator, plain, refuse_transforms

_SCAN_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? s0, Tensor? z0, Tensor? positions, Tensor? freq, "
    "Tensor? ranges, "
    "str feature_map, str normalize, float eps, bool interleaved, bool pool, bool map_first, "
    "float scale, int chunk, str backend"
)


def _causal_dot_fake(q, k, v, s0, z0, positions, freq, ranges, *options):
    options = ScanOptions(*options)
    b, t, h, d = q.shape
    sequences, states = b if ranges is None else ranges.shape[0], state_heads(q, k, v, freq)
    r, rz = options.widths(d)
    dtype, e = compute_dtype(q), v.shape[-1]
    return (
        v.new_empty((b, t, h, e)),
        q.new_empty((b, h, t if rz else 0), dtype=dtype),
        q.new_empty((sequences, states, r, e), dtype=dtype),
        q.new_empty((sequences, states, rz), dtype=dtype),
    )


@operator(
    f"causal_dot({_SCAN_INPUTS}) -> (Tensor o, Tensor den, Tensor s, Tensor z)", _causal_dot_fake
)
def _causal_dot(*args):
    return backends.load(args[-1]).causal_dot(*args[:8], ScanOptions(*args[8:]))


def _causal_dot_backward_fake(grad_o, grad_s, grad_z, q, k, v, s0, z0, positions, freq, *rest):
    needs = rest[-1]
    inputs = (q, k, v, s0, z0, positions, freq)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else q.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


@operator(
    f"causal_dot_backward(Tensor grad_o, Tensor? grad_s, Tensor? grad_z, {_SCAN_INPUTS}, "
    "Tensor o, Tensor den, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor ds0, "
    "Tensor dz0, Tensor dpositions, Tensor dfreq)",
    _causal_dot_backward_fake,
)
def _causal_dot_backward(*args):
    grads, inputs, options, saved = args[:3], args[3:11], ScanOptions(*args[11:20]), args[20:]
    return backends.load(options.backend).causal_dot_backward(grads, inputs, options, *saved)


class CausalDot(torch.autograd.Function):
    """o_m = sum_{n<=m} (phi_m . psi_n) v_n, normalised, with the state before and after.

    q is [B, T, H, D]; k and v have a divisor of H heads each, which neighbours of q's heads share.
    With ranges, int64 [S, 2], B is 1 and sequence i has the tokens from the first number of row i
    to before the second; there are S states, and tokens of no sequence get zeros.
    """

    @staticmethod
    def forward(ctx, q, k, v, s0, z0, positions, freq, ranges, options):
        """Return o [B, T, H, E] and the final state s [S, Hs, R, E], z [S, Hs, Rz]."""
        o, den, s, z = _causal_dot(q, k, v, s0, z0, positions, freq, ranges, *options)
        ctx.save_for_backward(q, k, v, s0, z0, positions, freq, ranges, o, den)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return o, s, z

    @staticmethod
    def backward(ctx, grad_o, grad_s, grad_z):
        """Return the gradients of the tensors."""
        *inputs, o, den = ctx.saved_tensors
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        alone = grad_s is None and grad_z is None and inputs[3] is None
        if alone and ctx.needs_input_grad[6] and ctx.options.relative:
            inputs[5] = inputs[5] - inputs[5][:, :1]
        args = (grad_o, grad_s, grad_z, *inputs, *ctx.options, o, den)
        return *first_order(_causal_dot_backward, args, ctx.needs_input_grad[:7]), None, None


def causal_dot(*tensors: Tensor | None, options: ScanOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `CausalDot`; without its bookkeeping where nothing is recorded.

    Args:
        tensors: q, k, v, s0, z0, positions, freq, ranges.
        options: Of the scan.
    """
    if plain(tensors):
        o, _, s, z = backends.load(options.backend).causal_dot(*tensors, options, save=False)
        return o, s, z
    refuse_transforms()
    return CausalDot.apply(*tensors, options)


def step(
    *tensors: Tensor | None,
    positions: Tensor | None,
    maps: tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | None,
    options: ScanOptions,
    lost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return o, s, z and lost of one token after a state, by one call of the backend.

    None where something is recorded, or the backend makes features and attends in several calls.

    Args:
        tensors: q, k, v, s0 and z0.
        positions: [B or 1, 1, L], if there are maps.
        maps: Of q and k.
        options: Of the scan.
        lost: What float32 rounded off s0 and z0, [S, Hs, R E + Rz]; default nothing.
    """
    of_maps = (x for each in maps or () for x in each if isinstance(x, Tensor))
    if not plain((*tensors, lost, positions, *of_maps)):
        return None
    backend = backends.load(options.backend)
    if not hasattr(backend, "step"):
        return None
    return backend.step(*tensors, positions, maps, options, lost)
