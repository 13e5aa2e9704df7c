"""Registration of operators with torch: schema, fake, gradient, its fake, no second derivative."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _torch

_LIB = torch.library.Library("fastpe", "DEF")


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator of this schema."""

    def register(impl: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIB.define(schema)
        _LIB.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpe::{name}", fake, lib=_LIB)
        return getattr(torch.ops.fastpe, name).default

    return register


def differentiable(
    name: str,
    *,
    tensors: str,
    options: type[tuple],
    outputs: str,
    learned: str,
    saved: str = "",
    fake: Callable,
    forward: Callable,
    backward: Callable,
) -> type[torch.autograd.Function]:
    """Register an operator and its gradient; return the autograd Function around them.

    The Function takes the tensors, then the options as one argument. It returns the outputs except
    those whose names begin with "_".

    Args:
        name: The operator's name; its gradient is `{name}_backward`.
        tensors: Names of the tensors, in order; "?" behind those that may be None.
        options: NamedTuple of the other arguments.
        outputs: Names of the outputs.
        learned: Names of the tensors that have gradients.
        saved: Names of the outputs that the gradient needs.
        fake: f(tensors, options), which returns empty outputs.
        forward: f(tensors, options), which returns the outputs.
        backward: f(grads, tensors, options, saved, needs), which returns the gradients of the
            learned tensors. `needs` has a bool for each; a gradient that is not needed is empty.
            Each argument is a tuple, and `options` the NamedTuple.
    """
    names = [x.rstrip("?") for x in tensors.split()]
    kinds = typing.get_type_hints(options)
    given = [f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in tensors.split()]
    given += [f"{kind.__name__} {x}" for x, kind in kinds.items()]
    outputs, learned, saved = outputs.split(), learned.split(), saved.split()
    shown = [i for i, x in enumerate(outputs) if x[0] != "_"]
    kept = [i for i, x in enumerate(outputs) if x in saved]
    where = [names.index(x) for x in learned]
    count, end, grads = len(names), len(names) + len(kinds), len(shown)

    def returns(names: Sequence[str]) -> str:
        each = [f"Tensor {x.strip('_')}" for x in names]
        return each[0] if len(each) == 1 else f"({', '.join(each)})"

    def call(*args):
        return forward(args[:count], options(*args[count:]))

    def call_fake(*args):
        return fake(args[:count], options(*args[count:]))

    forward_op = operator(f"{name}({', '.join(given)}) -> {returns(outputs)}", call_fake)(call)

    def call_backward(*args):
        inputs, needs = args[grads:], args[-1]
        given = inputs[:count], options(*inputs[count:end]), inputs[end:-1]
        return backward(args[:grads], *given, needs)

    def backward_fake(*args):
        inputs, needs = args[grads:], args[-1]
        return tuple(
            torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            if need
            else inputs[0].new_empty(0)
            for i, need in zip(where, needs, strict=True)
        )

    given = [f"Tensor? grad_{outputs[i]}" for i in shown] + given
    given += [f"Tensor {x.strip('_')}" for x in saved] + ["bool[] needs"]
    results = returns([f"d{x}" for x in learned])
    backward_op = operator(f"{name}_backward({', '.join(given)}) -> {results}", backward_fake)(
        call_backward
    )

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            options = args[count]
            made = forward_op(*args[:count], *options)
            made = (made,) if isinstance(made, Tensor) else made
            ctx.save_for_backward(*args[:count], *map(made.__getitem__, kept))
            ctx.options = options
            ctx.set_materialize_grads(False)
            return made[0] if grads == 1 else tuple(map(made.__getitem__, shown))

        @staticmethod
        def backward(ctx, *grads):
            if not any(grad is not None for grad in grads):
                return (None,) * (count + 1)
            tensors = ctx.saved_tensors
            needs = [ctx.needs_input_grad[i] for i in where]
            args = (*grads, *tensors[:count], *ctx.options, *tensors[count:], needs)
            found = _FirstOrder.apply(backward_op, *args)
            found = (found,) if isinstance(found, Tensor) else found
            out = [None] * (count + 1)
            for i, grad, need in zip(where, found, needs, strict=True):
                if need:
                    out[i] = grad
            return tuple(out)

    Differentiable.__name__ = Differentiable.__qualname__ = name
    return Differentiable


class _FirstOrder(torch.autograd.Function):
    """A gradient that refuses to be differentiated."""

    @staticmethod
    def forward(ctx, op, *args):
        return op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastpe's kernels have no second derivative: "
            "use backend='reference' for double backward, and no ConvSPE"
        )


def direct(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether a kernel can be called directly: nothing is recorded, traced or transformed.

    Raises:
        RuntimeError: torch.func transforms the tensors.
    """
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                refuse_transforms()
                return False
    if _torch.plain(tensors):
        return True
    refuse_transforms()
    return False


def refuse_transforms() -> None:
    """Raise RuntimeError under torch.func: torch would name a Function and what that lacks."""
    if _torch.transform() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastpe's kernels are not for torch.func (grad, vjp, jvp, vmap): use "
            "backend='reference' there"
        )
