"""The facts that every record holds (sizes, data, machine, versions), and records as text."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import re
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastpe

from . import pieces


@dataclass(frozen=True)
class Setup:
    """Sizes, dtype, data and machine of a measurement."""

    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    data: str | None = None
    song: int = 0
    backend: str = "auto"

    def piece(self) -> pieces.Piece:
        """Return the music, repeated to `length` steps."""
        return pieces.load(Path(self.data) if self.data else None, self.song).tile(self.length)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, [B, T, H, D]."""
        # on a GPU all cases share a process, so the inputs of the last length are kept
        made = _embedded.__wrapped__ if self.device == "cpu" else _embedded
        q, k, v = made(self)
        return q.detach(), k.detach(), v.detach()


@functools.lru_cache(maxsize=1)
def _embedded(setup: Setup) -> tuple[Tensor, ...]:
    made = pieces.embed(
        setup.piece(), setup.heads, setup.head_dim, setup.head_dim, setup.batch,
        dtype=getattr(torch, setup.dtype),
    )  # fmt: skip
    return tuple(x.to(setup.device) for x in made)


def environment(setup: Setup) -> dict:
    """Return versions, machine, commit, date and the backend in use."""
    return _machine(setup.device) | {"backend": backend(setup)}


def backend(setup: Setup) -> str:
    """Return the backend that runs fastpe where features, queries and values have D entries."""
    with warnings.catch_warnings():
        # the record names the backend: no process needs to warn that it is the slow one
        warnings.simplefilter("ignore")
        where, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        return fastpe.backends.resolve(setup.backend, where, dtype, (setup.head_dim,) * 3)


def _output(*command: str) -> str | None:
    # the first line that a program prints, or None
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return run.stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


@functools.cache
def _machine(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    here = str(Path(__file__).parent)
    found = {
        "torch": torch.__version__,
        "fastpe": fastpe.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _output("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cpu":
        return found
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | {"driver": driver, "cuda": torch.version.cuda, "triton": triton}


def describe(r: dict) -> str:
    """Return one line on a record's machine, versions and sizes."""
    on = f"{r['cpu']}, {r['threads']} threads"
    if r["device"] == "cuda":
        on = f"{r['gpu']}, driver {r['driver']}, CUDA {r['cuda']}, Triton {r['triton']}"
    return (
        f"{on}; torch {r['torch']}, fastpe {r['fastpe']} ({r['commit']}), backend {r['backend']}, "
        f"Python {r['python']}; B={r['batch']} H={r['heads']} D=E={r['head_dim']}, {r['dtype']}; "
        f"{r['date'][:10]}"
    )


def markdown(lines: list[list[str]]) -> str:
    """Return lines as a table that is also readable as text; the first line is its head."""
    head, *rest = lines
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rest]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def brief(x: float) -> str:
    """Return x with two digits; from 10 on, without decimals."""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"
