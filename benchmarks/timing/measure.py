"""Whether a case is right, and how long it takes beside others in the same process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import cases
import torch
from cases import Model
from torch import Tensor

from fastpe_lab.clocks import TOLERANCE, alternate, relative_error, spread
from fastpe_lab.records import Setup

FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)
CHECK_LENGTH = 200
BASELINE = "sdpa"


def compare(model: Model, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return the errors of the output and of every gradient against float64.

    Returns:
        errors: {"o", "dq", "dk", "dv", "dparameters"}, relative to the largest entry.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    o, o_wide = model.forward(*inputs), model.reference(*wide)
    do = output_gradient(o)
    # some baselines ignore q and k
    options = {"materialize_grads": True}
    grads = torch.autograd.grad(o, [*inputs, *model.parameters], do, **options)
    wide += model.reference_parameters
    grads_wide = torch.autograd.grad(o_wide, wide, do.to(o_wide.dtype), **options)
    names = ["o", "dq", "dk", "dv"][: len(inputs) + 1] + ["dparameters"] * len(model.parameters)
    worst: dict[str, float] = {}
    for key, x, y in zip(names, (o, *grads), (o_wide, *grads_wide), strict=True):
        worst[key] = max(worst.get(key, 0.0), relative_error(x, y))
    return worst


def beyond(worst: dict[str, float], dtype: str) -> str | None:
    """Return which errors are beyond the tolerance of a dtype, or None."""
    limits = TOLERANCE[dtype]
    bad = {k: e for k, e in worst.items() if not e <= limits[k == "dparameters"]}
    text = ", ".join(f"{key} {error:.1e}" for key, error in bad.items())
    return f"wrong against float64: relative error {text}" if bad else None


def check(name: str, setup: Setup, length: int = CHECK_LENGTH) -> dict:
    """Compare each variant of a case with float64, at a small length."""
    torch.set_num_threads(setup.threads)
    setup = replace(setup, length=min(length, setup.length))
    case = cases.of_device(setup.device)[name]
    worst: dict[str, float] = {}
    for variant in case.variants:
        for key, error in compare(case.build(setup, variant), setup.inputs()).items():
            worst[key] = max(worst.get(key, 0.0), error)
    error = beyond(worst, setup.dtype)
    return {"check": worst} | ({"error": error} if error else {})


def output_gradient(o: Tensor) -> Tensor:
    """Return a fixed Gaussian gradient for the output o."""
    generator = torch.Generator(o.device).manual_seed(1)
    return torch.randn(o.shape, generator=generator, device=o.device).to(o)


def call(model: Model, inputs: Sequence[Tensor], mode: str, do: Tensor) -> Callable[[], Tensor]:
    """Return a call to measure: a forward without gradients, or both passes of training."""
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


def in_turn(names: Sequence[str], setup: Setup, mode: str, seconds: float) -> dict[str, dict]:
    """Return {name: {"ms", "variant"}}: cases timed in turn, each by its fastest variant."""
    torch.set_num_threads(setup.threads)
    known, inputs = cases.of_device(setup.device), setup.inputs()
    do = output_gradient(inputs[2])
    calls = {
        (name, variant): call(known[name].build(setup, variant), inputs, mode, do)
        for name in names
        for variant in known[name].variants
    }
    found: dict[str, dict] = {}
    for (name, variant), times in alternate(calls, setup.device, seconds).items():
        ms = spread(times)
        if name not in found or ms["median"] < found[name]["ms"]["median"]:
            found[name] = {"ms": ms, "variant": variant}
    return found


def measure_time(name: str, setup: Setup, modes: dict[str, bool], seconds: float) -> dict:
    """Return {mode: {"ms", "sdpa_ms", "variant"}}.

    Args:
        name: the case.
        setup: the setup.
        modes: {mode: whether SDPA is timed in turn with the case}.
        seconds: the time to spend on a mode.
    """
    result = {}
    for mode, paired in modes.items():
        found = in_turn([name, BASELINE] if paired else [name], setup, mode, seconds)
        sdpa = found[BASELINE]["ms"] if paired else None
        result[mode] = {"ms": found[name]["ms"], "sdpa_ms": sdpa}
        result[mode]["variant"] = found[name]["variant"]
    return result
