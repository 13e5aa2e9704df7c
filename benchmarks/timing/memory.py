"""Extra peak memory of one call: the highest resident size during it less the size before it.

On a GPU it is the largest amount that torch had allocated there, less the amount before. Inputs and
the gradient of the output exist before the call. An earlier call on the first 128 tokens loads
code, starts threads and draws the noise that is kept. malloc asks the system for every block of
64 KiB or more and returns it when it is freed (M_MMAP_THRESHOLD). So no block is served unseen from
a heap that has grown before. This takes time, so times are measured elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import torch
from torch import Tensor

from fastpe_lab.records import Setup

from .measure import call, output_gradient

WARM_LENGTH = 128


def measure_memory(name: str, setup: Setup, mode: str, variant: int | None) -> dict:
    """Return {"extra_mb"}, in units of 10^6 bytes."""
    torch.set_num_threads(setup.threads)
    case = cases.of_device(setup.device)[name]
    if setup.device == "cpu":
        return_freed_memory()
    model, inputs = case.build(setup, variant), setup.inputs()
    do = output_gradient(inputs[2])
    measured = call(model, inputs, mode, do)
    if case.slow_start:
        # compiled code is made for one length
        measured()
    else:
        first = [x[:, :WARM_LENGTH] for x in (*inputs, do)]
        call(model, first[:3], mode, first[3])()
    gc.collect()
    if setup.device != "cpu":
        return {"extra_mb": cuda_peak(measured) / 1e6}
    before = start_peak()
    o = measured()
    extra = peak() - before
    if not bool(o.isfinite().all()):
        raise ArithmeticError("the output is not finite")
    return {"extra_mb": max(extra, 0) / 1e6}


def return_freed_memory() -> None:
    """Make malloc return every larger block to the system when it is freed (glibc only)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 65536)
        libc.mallopt(m_trim_threshold, 0)
        libc.malloc_trim(0)


def start_peak() -> int:
    """Start to measure the peak from now, where Linux allows it; return the resident bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak()


def peak() -> int:
    """Return the largest resident size since `start_peak`, or of the process, in bytes."""
    try:
        return _status("VmHWM")
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def cuda_peak(function: Callable[[], Tensor]) -> int:
    """Return the largest number of bytes that a call has allocated on the GPU at a time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
    """Give back the memory that a finished or failed measurement holds."""
    gc.collect()
    if device != "cpu":
        with contextlib.suppress(RuntimeError):  # after a fault nothing can be given back
            torch.cuda.empty_cache()
