"""The operators, their fakes, and the two autograd Functions around them.

    causal_dot       features, causal linear attention and normaliser of q, k, v
    phase_features   features of SPE and F-StrIPE
    philox_normal    noise

An operator is registered once and forwards to the module of the backend it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, noise
from .maps import Rotation, SineMap

_LIB = torch.library.Library("fastpe", "DEF")


def _op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator of this schema."""

    def register(impl: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIB.define(schema)
        _LIB.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpe::{name}", fake, lib=_LIB)
        return getattr(torch.ops.fastpe, name).default

    return register


class ScanOptions(NamedTuple):
    """How `causal_dot` makes features and weights; see `maps.Rotation` for the middle four."""

    feature_map: str
    normalize: str  # "none", "sum" or "abs"
    eps: float
    interleaved: bool
    pool: bool
    map_first: bool
    scale: float
    chunk: int  # 0: the backend's choice
    backend: str

    @staticmethod
    def of_features(
        normalize: str, eps: float, chunk_size: int | None, backend: str
    ) -> ScanOptions:
        """Return options for features that are made already."""
        made = {"interleaved": False, "pool": False, "map_first": True, "scale": 1.0}
        return ScanOptions(
            "identity", normalize, eps, chunk=chunk_size or 0, backend=backend, **made
        )

    @property
    def relative(self) -> bool:
        """Whether only differences of positions count, unless a state goes in or out.

        The gradient of frequencies then is that of positions from the first on, which are small:
        their products with rounding errors do not cancel as the exact ones do.
        """
        return not self.pool and (self.map_first or self.feature_map == "identity")

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Return R and Rz, the features of the numerator and of the normaliser."""
        r = head_dim // 2 if self.pool else head_dim
        # the normaliser sees the features that are not rotated, if psi comes first
        rz = head_dim if self.map_first else r
        return r, 0 if self.normalize == "none" else rz


_SCAN_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? s0, Tensor? z0, Tensor? positions, Tensor? freq, "
    "Tensor? ranges, "
    "str feature_map, str normalize, float eps, bool interleaved, bool pool, bool map_first, "
    "float scale, int chunk, str backend"
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic and states: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state_heads(q: Tensor, k: Tensor, v: Tensor, freq: Tensor | None) -> int:
    """Return how many states the heads of q have: they share one if they share keys and values.

    Not if each rotates the keys by frequencies of its own.
    """
    heads = max(k.shape[2], v.shape[2])
    return heads if freq is None or freq.shape[0] == 1 else q.shape[2]


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


@_op(f"causal_dot({_SCAN_INPUTS}) -> (Tensor o, Tensor den, Tensor s, Tensor z)", _causal_dot_fake)
def _causal_dot(*args):
    return backends.load(args[-1]).causal_dot(*args[:8], ScanOptions(*args[8:]))


def _causal_dot_backward_fake(grad_o, grad_s, grad_z, q, k, v, s0, z0, positions, freq, *rest):
    needs = rest[-1]
    inputs = (q, k, v, s0, z0, positions, freq)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else q.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


@_op(
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
        return *_first_order(_causal_dot_backward, args, ctx.needs_input_grad[:7]), None, None


def causal_dot(*tensors: Tensor | None, options: ScanOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `CausalDot`; without its bookkeeping where nothing is recorded.

    Args:
        tensors: q, k, v, s0, z0, positions, freq, ranges.
        options: Of the scan.
    """
    if _plain(tensors):
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
    if not _plain((*tensors, lost, positions, *of_maps)):
        return None
    backend = backends.load(options.backend)
    if not hasattr(backend, "step"):
        return None
    return backend.step(*tensors, positions, maps, options, lost)


def observed() -> bool:
    """Return whether what is done with tensors now is traced or transformed, not just done."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def refuse_transforms() -> None:
    """Raise RuntimeError under torch.func: torch would name a Function and what that lacks."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "fastpe's kernels are not for torch.func (grad, vjp, jvp, vmap): use "
            "backend='reference' there"
        )


_EAGER = Tensor, torch.nn.Parameter


def _plain(tensors: tuple[Tensor | None, ...]) -> bool:
    # neither traced nor differentiated: the kernel can be called as it is
    if observed():
        return False
    recorded = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in _EAGER or (recorded and x.requires_grad)):
            return False
    return True


_SINE_INPUTS = (
    "Tensor x, Tensor positions, Tensor freq, Tensor? offset, Tensor gain, Tensor? gate, "
    "Tensor? noise, bool pool, bool group, str backend"
)


def _phase_features_fake(x, positions, freq, offset, gain, gate, z, pool, group, backend):
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return x.new_empty((*x.shape[:2], freq.shape[0], sines.feature_dim))


@_op(f"phase_features({_SINE_INPUTS}) -> Tensor", _phase_features_fake)
def _phase_features(*args):
    x, positions, freq, offset, gain, gate, z, pool, group, backend = args
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return backends.load(backend).phase_features(x, positions, sines, group)


def _phase_features_backward_fake(grad_y, x, positions, freq, offset, gain, gate, *rest):
    needs = rest[-1]
    inputs = (x, positions, freq, offset, gain, gate)
    return tuple(
        torch.empty_like(i, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for i, need in zip(inputs, needs, strict=True)
    )


@_op(
    f"phase_features_backward(Tensor grad_y, {_SINE_INPUTS}, bool[] needs) -> (Tensor dx, "
    "Tensor dpositions, Tensor dfreq, Tensor doffset, Tensor dgain, Tensor dgate)",
    _phase_features_backward_fake,
)
def _phase_features_backward(*args):
    grad_y, x, positions, freq, offset, gain, gate, z, pool, group, backend, needs = args
    sines = SineMap(freq, offset, gain, gate, z, pool)
    return backends.load(backend).phase_features_backward(grad_y, x, positions, sines, group, needs)


class PhaseFeatures(torch.autograd.Function):
    """Features of SPE and F-StrIPE (`reference.sine_features`), without the codes."""

    @staticmethod
    def forward(ctx, x, positions, freq, offset, gain, gate, z, pool, group, backend):
        """Return the features, [B, T, H, R], H of freq; neighbours may share a head of x."""
        y = _phase_features(x, positions, freq, offset, gain, gate, z, pool, group, backend)
        ctx.save_for_backward(x, positions, freq, offset, gain, gate, z)
        ctx.options = pool, group, backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """Return the gradients of the tensors; the noise has none."""
        args = (grad_y, *ctx.saved_tensors, *ctx.options)
        grads = _first_order(_phase_features_backward, args, ctx.needs_input_grad[:6])
        return *grads, None, None, None, None


def phase_features(
    x: Tensor, positions: Tensor, sines: SineMap, *, group: bool = True, backend: str
) -> Tensor:
    """Apply `PhaseFeatures`; without its bookkeeping where nothing is recorded.

    Args:
        group: Make codes once for equal positions; False is for measurements.
    """
    if _plain((x, positions, *sines[:-1])):
        return backends.load(backend).phase_features(x, positions, sines, group)
    refuse_transforms()
    return PhaseFeatures.apply(x, positions, *sines, group, backend)


class _FirstOrder(torch.autograd.Function):
    """A gradient whose own gradient is refused."""

    @staticmethod
    def forward(ctx, op, needs, *args):
        return op(*args, needs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastpe's kernels have no second derivative: "
            "use backend='reference' for double backward, and no ConvSPE"
        )


def _first_order(op: Callable, args: tuple, needs: tuple[bool, ...]) -> list[Tensor | None]:
    grads = _FirstOrder.apply(op, list(needs), *args)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


@_op(
    "philox_normal(Tensor seed, Tensor step, int module, int kind, int[] shape, ScalarType dtype, "
    "int first=0) -> Tensor",
    lambda seed, step, module, kind, shape, dtype, first=0: seed.new_empty(shape, dtype=dtype),
)
def philox_normal(seed, step, module, kind, shape, dtype, first=0):
    """Return the numbers of `noise.philox_normal`, by a kernel where there is one."""
    backend = {"cpu": "cpu", "cuda": "triton"}.get(seed.device.type)
    if backend and backends.unavailable(backend, seed.device) is None:
        return backends.load(backend).philox_normal(seed, step, module, kind, shape, dtype, first)
    return noise.philox_normal(seed, step, module, kind, tuple(shape), dtype, first)


@_op("count_forward(Tensor(a!) step, int unit) -> ()", lambda step, unit: None)
def count_forward(step, unit):
    """Add a unit to the step of the noise, in compiled code."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a compiled forward with noise was run again inside backward, which would draw it "
            "anew: compile around the checkpoint, not inside, or construct the encoding with "
            "resample='never' and call resample_() before each forward"
        )
    step.add_(unit)
