"""Helpers of all launchers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


class Card(NamedTuple):
    """A card's multiprocessors and bytes of shared memory for one program."""

    processors: int
    shared: int


@functools.cache
def card(device: torch.device) -> Card:
    """Return a device's `Card`; the interpreter has one processor."""
    if device.type == "cpu":
        return Card(1, 227 << 10)
    found = torch.cuda.get_device_properties(device)
    return Card(found.multi_processor_count, found.shared_memory_per_block_optin)


def numbers(dtype: torch.dtype) -> dict[str, object]:
    """Return the arithmetic for a dtype: ACC for sums, DOT for operands of products."""
    if dtype == torch.float64:
        return {"ACC": tl.float64, "DOT": tl.float64, "PRECISION": "ieee"}
    if dtype == torch.bfloat16:
        return {"ACC": tl.float32, "DOT": tl.bfloat16, "PRECISION": "tf32"}
    # tf32 has as many digits as float16 and does not overflow
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return {"ACC": tl.float32, "DOT": tl.float32, "PRECISION": precision}


def power(x: int) -> int:
    """Return the smallest block of x columns that tensor cores take."""
    return max(16, triton.next_power_of_2(x))


def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return new memory on x's device, by default with x's dtype."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def rows(x: Tensor) -> Tensor:
    """Return x with contiguous rows, as kernels read it."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Kernel:
    """A kernel with its constants, which launches in a few microseconds.

    Triton inspects every argument of every launch to find the compiled code. This class does so
    once for each combination of types, sizes and alignments.

    Args:
        function: The jitted function, with its constants last.
        meta: Constants by name, `num_warps` and `num_stages`.
    """

    def __init__(self, function: Callable, meta: dict[str, object]) -> None:
        self.function, self.meta = function, meta
        names = [name for name in function.arg_names if name in meta]
        self.constants = tuple(meta[name] for name in names)
        self.launchers: dict[tuple, Callable] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: tuple[int, ...]
    ) -> None:
        """Launch the kernel on the current device and stream.

        Args:
            grid: Programs along three axes.
            tensors: First arguments; the first dtype, constants and numbers fix the other dtypes.
            numbers: Arguments after the tensors.
        """
        if INTERPRETED:
            self.function[grid](*tensors, *numbers, **self.meta)
            return
        first, aligned = tensors[0], 0
        for x in tensors:
            aligned = 2 * aligned + (x.data_ptr() % 16 == 0)
        key = first.dtype, first.get_device(), aligned, numbers
        compiled = self.launchers.get(key)
        if compiled is None:
            if len(self.launchers) > 256:
                self.launchers.clear()
            self.launchers[key] = self.function[grid](*tensors, *numbers, **self.meta)
        else:
            compiled[grid](*tensors, *numbers, *self.constants)


@functools.lru_cache(maxsize=1024)
def kernel(function: Callable, *constants: tuple[str, object]) -> Kernel:
    """Return the kernel of a function and its constants."""
    return Kernel(function, dict(constants))
