"""Correctness and time of a case: what is measured, on what, and how.

The case and scaled_dot_product_attention (SDPA) are timed in turn in one process, so that their
ratio survives a machine that is busy or slow for a while. Memory is memory.py's.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import devices
import torch
from torch import Tensor

import fastpe

import pieces

FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)
CHECK_LENGTH = 200
BASELINE = "sdpa"
# relative to the largest entry; gradients of frequencies sum over all tokens, hence the second
TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-3),
    "float16": (2e-2, 5e-2),
    "bfloat16": (5e-2, 2e-1),
}


@dataclass(frozen=True)
class Setup:
    """What is measured on: sizes, numbers, data, machine."""

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
        """Return the music, `length` steps of it."""
        return pieces.load(Path(self.data) if self.data else None, self.song).tile(self.length)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, [B, T, H, D]."""
        # on a GPU, where all cases share a process, those of one length are made once
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


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Model:
    """A case made ready for one setup.

    Args:
        forward: q, k, v [B, T, H, D] to o.
        reference: The same in float64, from the formula.
        parameters: What forward learns besides.
        reference_parameters: Their float64 copies, in the same order.
        redraw: Draws new noise, as training does before each forward.
    """

    forward: Attention
    reference: Attention
    parameters: list[Tensor] = field(default_factory=list)
    reference_parameters: list[Tensor] = field(default_factory=list)
    redraw: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Args:
        label: Name in plots.
        build: Makes the model of a setup and a variant.
        extra_bytes: Predicted peak, of a setup and whether it trains; None if it is small.
        variants: Settings of which the fastest counts, such as chunk sizes.
        quadratic: Time grows with the square of the length.
        quadratic_memory: So does memory.
        causal: No output depends on later tokens.
        slow_start: Compiles for seconds before the first call; left out by --quick.
        ours: One of fastpe's.
        unavailable: Returns why the case cannot run here with a setup, or None.
    """

    label: str
    build: Callable[[Setup, int | None], Model]
    extra_bytes: Callable[[Setup, bool], float] | None = None
    variants: tuple[int | None, ...] = (None,)
    quadratic: bool = False
    quadratic_memory: bool = False
    causal: bool = True
    slow_start: bool = False
    ours: bool = False
    unavailable: Callable[[Setup], str | None] = lambda setup: None


def find(table: str, name: str) -> Case:
    """Return a case of a table given as "module.TABLE": tables cannot travel to a process."""
    module, attribute = table.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)[name]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the largest entry; infinity for nan."""
    difference = (value.double() - reference.double()).abs().max().item()
    scale = max(reference.double().abs().max().item(), 1e-30)
    return difference / scale if difference == difference else float("inf")


def check(table: str, name: str, setup: Setup, length: int = CHECK_LENGTH) -> dict:
    """Compare output and every gradient with float64, at a small length, for each variant."""
    torch.set_num_threads(setup.threads)
    setup = replace(setup, length=min(length, setup.length))
    case = find(table, name)
    limits = TOLERANCE[setup.dtype]
    worst: dict[str, float] = {}
    for variant in case.variants:
        model = case.build(setup, variant)
        q, k, v = (x.requires_grad_() for x in setup.inputs())
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        o, o_wide = model.forward(q, k, v), model.reference(*wide)
        do = output_gradient(o)
        # not every baseline uses q and k
        options = {"materialize_grads": True}
        grads = torch.autograd.grad(o, [q, k, v, *model.parameters], do, **options)
        wide += model.reference_parameters
        grads_wide = torch.autograd.grad(o_wide, wide, do.to(o_wide.dtype), **options)
        names = ["o", "dq", "dk", "dv"] + ["dparameters"] * len(model.parameters)
        for key, x, y in zip(names, (o, *grads), (o_wide, *grads_wide), strict=True):
            worst[key] = max(worst.get(key, 0.0), relative_error(x, y))
    bad = {k: e for k, e in worst.items() if not e <= limits[k == "dparameters"]}
    if bad:
        text = ", ".join(f"{key} {error:.1e}" for key, error in bad.items())
        return {"error": f"wrong against float64: relative error {text}", "check": worst}
    return {"check": worst}


def output_gradient(o: Tensor) -> Tensor:
    """Return a fixed Gaussian gradient for the output o."""
    generator = torch.Generator(o.device).manual_seed(1)
    return torch.randn(o.shape, generator=generator, device=o.device).to(o)


def call(model: Model, inputs: tuple[Tensor, ...], mode: str, do: Tensor) -> Callable[[], Tensor]:
    """Return one measured call: a forward without gradients, or a training step's two passes."""
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return model.forward(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]

    def training() -> Tensor:
        model.redraw()
        o = model.forward(*leaves)
        torch.autograd.grad(o, [*leaves, *model.parameters], do, allow_unused=True)
        return o

    return training


def alternate(
    functions: dict[str, Callable[[], Tensor]], device: str, seconds: float, host: bool = True
) -> dict[str, list[float]]:
    """Time the functions in turn, after a warm-up each, for about `seconds`: 3 to 50 rounds.

    On a GPU with or without the time of the host (`devices.CudaClock`).
    """
    milliseconds = devices.clock(device, host)
    for function in functions.values():
        o = function()
        if not bool(o.isfinite().all()) or not bool(o.any()):
            raise ArithmeticError("the output is not finite, or zero")
    times: dict[str, list[float]] = {name: [] for name in functions}
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
    """Return median, quartiles and number of the times in milliseconds."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(times)}


def measure_time(
    table: str, name: str, setup: Setup, modes: dict[str, bool], seconds: float
) -> dict:
    """Return {mode: {"ms", "sdpa_ms", "variant"}} for the modes, with SDPA in turn where paired."""
    torch.set_num_threads(setup.threads)
    case, inputs = find(table, name), setup.inputs()
    models = {variant: case.build(setup, variant) for variant in case.variants}
    do = output_gradient(inputs[2])
    result = {}
    for mode, paired in modes.items():
        functions = {variant: call(model, inputs, mode, do) for variant, model in models.items()}
        if paired:
            baseline = find(table, BASELINE).build(setup, None)
            functions[BASELINE] = call(baseline, inputs, mode, do)
        times = {key: spread(t) for key, t in alternate(functions, setup.device, seconds).items()}
        best = min(models, key=lambda variant: times[variant]["median"])
        result[mode] = {"ms": times[best], "sdpa_ms": times.get(BASELINE), "variant": best}
    return result


def environment(setup: Setup) -> dict:
    """Return versions, machine, commit and date, as every record holds them, and the backend."""
    return _machine(setup.device) | {"backend": backend(setup)}


def backend(setup: Setup) -> str:
    """Return the backend that fastpe's cases run on, of as many features as the head dim."""
    with warnings.catch_warnings():
        # the backend is recorded; no need to be told in each process that it is the slow one
        warnings.simplefilter("ignore")
        where, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        return fastpe.backends.resolve(setup.backend, where, dtype, (setup.head_dim,) * 3)


@functools.cache
def _machine(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "torch": torch.__version__,
        "fastpe": fastpe.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    } | devices.describe(device)
