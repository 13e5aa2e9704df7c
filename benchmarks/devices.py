"""What differs between the CPU and a GPU: clocks, warm-up, limits of memory, and what is recorded.

Everything that needs a GPU to be tried is here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# bytes written between calls, several times the L2 cache of any card
FLUSH = 2**28
# a pause runs for so many cycles a millisecond at the least: no card has a higher clock
CYCLES = 2_100_000
LONGEST_PAUSE = 20.0


class Clock:
    """Measures the milliseconds of one call on the CPU."""

    def __call__(self, function: Callable[[], object]) -> float:
        """Return the time of one call."""
        start = time.perf_counter_ns()
        function()
        return (time.perf_counter_ns() - start) * 1e-6


class CudaClock(Clock):
    """Measures by events on the device, with nothing of the call in its L2 cache.

    With the host: from an idle device on, so that the time to launch counts, as one waits for it.
    Without: the device is kept busy until everything is launched, as a graph or a full queue would
    have it; a call that itself waits for the device has its time from then on in both.
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
        # twice what the host takes for the call and its events, measured once
        if function not in self._pauses:
            torch.cuda.synchronize()
            taken = super().__call__(function)
            torch.cuda.synchronize()
            self._pauses[function] = min(2 * taken + 0.2, LONGEST_PAUSE)
        return self._pauses[function]


def clock(device: str, host: bool = True) -> Clock:
    """Return the clock of a device; on a GPU with or without the time of the host."""
    return Clock() if device == "cpu" else CudaClock(host)


def copy_rate(device: str, size: int, repeats: int = 20) -> list[float]:
    """Return the bytes a second that copies on the device read and write together.

    Args:
        device: "cpu" or "cuda".
        size: Bytes of the tensor that is copied.
        repeats: Number of copies that are timed, after two that are not.
    """
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    watch = clock(device, host=False)

    def copy() -> None:
        target.copy_(source)

    times = [watch(copy) for _ in range(repeats + 2)][2:]
    return [2 * 4 * source.numel() / (ms * 1e-3) for ms in times]


def total_memory(device: str) -> int:
    """Return the bytes of memory that this process may use."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        size = min(size, int(limit.read_text()))
    return size


def release(device: str) -> None:
    """Give back what a failed or finished measurement holds."""
    gc.collect()
    if device != "cpu":
        with contextlib.suppress(RuntimeError):  # after a fault nothing can be given back
            torch.cuda.empty_cache()


def cuda_peak(function: Callable[[], Tensor]) -> int:
    """Return the largest number of bytes that a call has allocated on the GPU at a time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def describe(device: str) -> dict:
    """Return what records hold of a GPU besides its name."""
    if device == "cpu":
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        driver = found.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.SubprocessError):
        driver = None
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"driver": driver, "cuda": torch.version.cuda, "triton": triton}


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the replay of a call as a CUDA graph; its output is overwritten by the next one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
