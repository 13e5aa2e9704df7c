"""Checks of arguments that modules of every kind have."""

from __future__ import annotations

from torch import Tensor

from ._torch import assert_later, in_mode


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless a value is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def shape(x: object) -> str:
    """Return the shape of a tensor, or the type of anything else, for a message."""
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError for a nested tensor, and say how its sequences are given instead."""
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: give its values() as one row, "
            "[1, T, ...], and its offsets() as cu_seqlens"
        )


def check_position_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError for positions in a dtype that cannot hold them."""
    if x.is_floating_point() and x.dtype.itemsize < 4:
        raise TypeError(
            f"{name} must be integers, bools, float32 or float64, got {x.dtype}, which rounds "
            "positions. Where FSDP or DDP casts inputs, give integers, or set "
            "cast_forward_inputs=False in its mixed precision"
        )
    if x.is_complex():
        raise TypeError(f"{name} must be integers, bools, float32 or float64, got {x.dtype}")


def require(condition: Tensor, message: str, wait: bool = True) -> None:
    """Raise ValueError unless a condition holds; wait: for a GPU too, to have a look.

    Compiled code, and a GPU that is not waited for, raise RuntimeError where they find it.
    """
    # compiled code cannot stop to look: it raises RuntimeError where it is run
    blind = not wait and condition.device.type != "cpu"
    if blind or in_mode():
        assert_later(condition, message)
    elif not condition:
        raise ValueError(message)
