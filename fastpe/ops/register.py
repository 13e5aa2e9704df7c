"""Registration of operators, and when a kernel may be called without torch's bookkeeping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIB = torch.library.Library("fastpe", "DEF")
_EAGER = Tensor, torch.nn.Parameter


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator of this schema."""

    def register(impl: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIB.define(schema)
        _LIB.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpe::{name}", fake, lib=_LIB)
        return getattr(torch.ops.fastpe, name).default

    return register


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


def plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether nothing is traced or recorded, so that a kernel can be called directly."""
    if observed():
        return False
    recorded = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in _EAGER or (recorded and x.requires_grad)):
            return False
    return True


class FirstOrder(torch.autograd.Function):
    """A gradient whose own gradient is refused."""

    @staticmethod
    def forward(ctx, op, needs, *args):
        """Return the gradients by the operator `op`."""
        return op(*args, needs)

    @staticmethod
    def backward(ctx, *grads):
        """Raise RuntimeError."""
        raise RuntimeError(
            "fastpe's kernels have no second derivative: "
            "use backend='reference' for double backward, and no ConvSPE"
        )


def first_order(op: Callable, args: tuple, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients by the operator `op`, None where not needed; refuse their derivative."""
    grads = FirstOrder.apply(op, list(needs), *args)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]
