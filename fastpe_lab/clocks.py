"""Time functions in turn, so that their ratio survives a machine that is slow for a while."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

# the error allowed against float64, relative to the largest entry: first of outputs, then of
# parameters' gradients, which sum over all tokens
TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-3),
    "float16": (2e-2, 5e-2),
    "bfloat16": (5e-2, 2e-1),
}
# bytes written between calls, several times the L2 cache of any card
FLUSH = 2**28
# cycles of a pause for each millisecond; no card has a higher clock
CYCLES = 2_100_000
LONGEST_PAUSE = 20.0


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the largest entry, or infinity for NaN."""
    difference = (value.double() - reference.double()).abs().max().item()
    scale = max(reference.double().abs().max().item(), 1e-30)
    return difference / scale if difference == difference else float("inf")


class Clock:
    """Measures one call on the CPU, in milliseconds."""

    def __call__(self, function: Callable[[], object]) -> float:
        """Return the time of one call."""
        start = time.perf_counter_ns()
        function()
        return (time.perf_counter_ns() - start) * 1e-6


class CudaClock(Clock):
    """Measures one call by events on a GPU whose L2 cache holds nothing of the call.

    Args:
        host: True to start on an idle device, so that the time includes the launch, as a user
            waits for it. False to keep the device busy until everything is launched, as in a graph
            or behind a full queue. A call that itself waits for the device is timed from there on
            in both cases.
    """

    def __init__(self, host: bool) -> None:
        self._host = host
        self._flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
        self._pauses: dict[Callable[[], object], float] = {}

    def __call__(self, function: Callable[[], object]) -> float:
        """Return the time of one call."""
        pause = 0.0 if self._host else self._pause(function)
        self._flush.zero_()
        if self._host:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(int(pause * CYCLES))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _pause(self, function: Callable[[], object]) -> float:
        # twice the host's time for the call and its events, measured once
        if function not in self._pauses:
            torch.cuda.synchronize()
            taken = super().__call__(function)
            torch.cuda.synchronize()
            self._pauses[function] = min(2 * taken + 0.2, LONGEST_PAUSE)
        return self._pauses[function]


def clock(device: str, host: bool = True) -> Clock:
    """Return the clock of a device; on a GPU it includes the host's time, or not."""
    return Clock() if device == "cpu" else CudaClock(host)


def alternate(
    functions: dict[Key, Callable[[], Tensor]], device: str, seconds: float, host: bool = True
) -> dict[Key, list[float]]:
    """Return the milliseconds of functions that are called in turn, 3 to 50 rounds.

    Args:
        functions: the functions; each is called once before, and must return finite numbers.
        device: "cpu" or "cuda".
        seconds: the time to spend, about.
        host: whether times on a GPU include the launch (`CudaClock`).
    """
    milliseconds = clock(device, host)
    for function in functions.values():
        o = function()
        if not bool(o.isfinite().all()) or not bool(o.any()):
            raise ArithmeticError("the output is not finite, or zero")
    times: dict[Key, list[float]] = {name: [] for name in functions}
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(1, 51):
            for name, function in functions.items():
                times[name].append(milliseconds(function))
            if done >= 3 and (time.perf_counter() - start) * (done + 1) / done > seconds:
                break
    finally:
        gc.enable()
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Return the median, the quartiles and the number of times."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(times)}
