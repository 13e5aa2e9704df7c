"""Extra peak memory of one call: the highest resident size during it less the size before it.

On a GPU: the most that torch had allocated there, less what it had before.

The inputs, and for training the gradient of the output, are there before. A call on the first 128
tokens comes first: it loads code, starts threads, draws noise that is kept. From 64 KiB up, memory
is asked of the system and given back to it when freed (M_MMAP_THRESHOLD), so that no allocation is
served unseen from a heap that has grown before; this costs time, so times are taken elsewhere.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import devices
import torch
from harness import Setup, call, find, output_gradient

WARM_LENGTH = 128


def measure_memory(table: str, name: str, setup: Setup, mode: str, variant: int | None) -> dict:
    """Return {"extra_mb"}, in units of 10^6 bytes."""
    torch.set_num_threads(setup.threads)
    case = find(table, name)
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
        call(model, tuple(first[:3]), mode, first[3])()
    gc.collect()
    if setup.device != "cpu":
        return {"extra_mb": devices.cuda_peak(measured) / 1e6}
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
    """Start the peak again from now, where Linux allows it; return the resident bytes."""
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
