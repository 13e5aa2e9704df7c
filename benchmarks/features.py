"""Features of SPE and F-StrIPE alone: fused, grouped by unique position, and from codes.

    python benchmarks/features.py

Encodes queries once, forward and forward+backward. F-StrIPE's positions repeat, so that its codes
can be made once for each distinct one; SineSPE's never do. Writes DIR/features.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import options
import report
import torch
from cases import fstripe_sff, sinespe
from harness import (
    CHECK_LENGTH,
    FORWARD,
    MODES,
    TOLERANCE,
    Setup,
    alternate,
    backend,
    environment,
    output_gradient,
    relative_error,
    spread,
)
from isolated import runner
from peers import MaterialisedSPE
from torch import Tensor, nn
from tqdm import tqdm

import fastpe
from fastpe.backends import reference
from fastpe.ops.sine_features import SineFeatures

# positions of the piece, from all different to nearly all the same
POSITIONS = ("time", "bar", "chord", "phrase")


def providers(
    encoding: nn.Module, positions: Tensor, setup: Setup
) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """Return name -> (x to features, learned tensors)."""
    used = backend(setup)
    learned = list(encoding.parameters())
    if used == "reference":
        raise RuntimeError("no fused features here: " + str(fastpe.available_backends()))

    def fused(group: bool) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            sines = encoding.position_maps()[0]
            return SineFeatures.apply(x, positions[:, : x.shape[1]], *sines, group, used)

        return run

    spe = MaterialisedSPE(setup)

    def codes(x: Tensor) -> Tensor:
        return (x[..., None] * spe.codes(x.shape[1])[0]).sum(-2)

    rows = {"ungrouped": (fused(False), learned), "grouped": (fused(True), learned)}
    if isinstance(encoding, fastpe.SineSPE):
        rows["codes"] = codes, spe.parameters[:]
    return rows


def measure(setup: Setup, field: str, seconds: float) -> dict:
    """Return {mode: {provider: times}} with positions of this field, "" for SineSPE's."""
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    make = fstripe_sff if field else sinespe
    encoding = make(setup.head_dim, setup.heads).to(setup.device).eval()
    labels = getattr(setup.piece(), field or "time")
    positions = torch.from_numpy(labels).to(setup.device).double()[None, :, None]
    x = setup.inputs()[0]
    rows = providers(encoding, positions, setup)
    check(encoding, x[:, :CHECK_LENGTH], positions[:, :CHECK_LENGTH], rows, setup)
    result: dict = {"unique": len(np.unique(labels))}
    for mode in MODES:
        calls = {name: call(run, learned, x, mode) for name, (run, learned) in rows.items()}
        times = alternate(calls, setup.device, seconds)
        result[mode] = {name: spread(t) for name, t in times.items()}
    return result


def call(
    run: Callable[[Tensor], Tensor], learned: list[Tensor], x: Tensor, mode: str
) -> Callable[[], Tensor]:
    """Return one measured call."""
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return run(x)

        return forward
    leaf = x.detach().requires_grad_()
    with torch.no_grad():
        dy = output_gradient(run(x))

    def training() -> Tensor:
        y = run(leaf)
        # the codes of keys alone have no part in the features of queries
        torch.autograd.grad(y, [leaf, *learned], dy, allow_unused=True)
        return y

    return training


def check(encoding: nn.Module, x: Tensor, positions: Tensor, rows: dict, setup: Setup) -> None:
    """Raise unless the fused features and dx are those of the specification in float64."""
    wide = x.double().requires_grad_()
    y = reference.sine_features(wide, positions, encoding.double().position_maps()[0])
    dy = output_gradient(y)
    (dx,) = torch.autograd.grad(y, wide, dy)
    encoding.float()
    for name in ("ungrouped", "grouped"):
        leaf = x.detach().requires_grad_()
        z = rows[name][0](leaf)
        (dz,) = torch.autograd.grad(z, leaf, dy.to(z.dtype))
        error = max(relative_error(z, y), relative_error(dz, dx))
        if not error <= TOLERANCE[setup.dtype][0]:
            raise ArithmeticError(f"{name}: relative error {error:.1e} against float64")


def main() -> int:
    """Run the benchmark; return 1 if a row was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    options.add(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repeats of a row")
    args = parser.parse_args()
    options.check(parser, args, "lengths")
    isolated, records = runner(args.device), []
    rows = [(length, field) for length in args.lengths for field in ("", *POSITIONS)]
    for length, field in tqdm(rows, unit="row"):
        setup = options.setup(args, length)
        result = isolated(measure, setup, field, args.seconds)
        name = f"F-StrIPE:SFF, {field}" if field else "SineSPE, time"
        found = asdict(setup) | environment(setup)
        records.append({"row": name, **found, **result})
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (args.out / "features.jsonl").write_text("\n".join(lines) + "\n")
    print(table(records))
    return int(any("error" in record for record in records))


def table(records: list[dict]) -> str:
    """Return the records in markdown."""
    lines = [["features", "T", "T/unique", "mode", "ungrouped ms", "grouped ms", "codes ms"]]
    lines[0] += ["grouping", "over codes"]
    for r in records:
        if "error" in r:
            lines.append([r["row"], str(r["length"]), *["error"] * 7])
            continue
        for mode in MODES:
            ms = {name: t["median"] for name, t in r[mode].items()}
            best = min(ms["grouped"], ms["ungrouped"])
            lines.append(
                [
                    r["row"],
                    str(r["length"]),
                    report.brief(r["length"] / r["unique"]),
                    mode,
                    report.brief(ms["ungrouped"]),
                    report.brief(ms["grouped"]),
                    report.brief(ms["codes"]) if "codes" in ms else "",
                    report.brief(ms["ungrouped"] / ms["grouped"]) + "x",
                    report.brief(ms["codes"] / best) + "x" if "codes" in ms else "",
                ]
            )
    errors = [f"- {r['row']}, {r['length']}: {r['error']}" for r in records if "error" in r]
    return "\n".join([report.markdown(lines), *errors, "", report.describe(records[-1])])


if __name__ == "__main__":
    sys.exit(main())
