"""Features of SPE and F-StrIPE alone: fused, grouped by equal positions, and from codes.

    python benchmarks/features.py

Encodes queries once, forward and forward+backward. F-StrIPE's positions repeat, so its codes can be
made once for each distinct one. SineSPE's positions never repeat. Writes DIR/features.jsonl.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import torch
from cases import Model
from cases.ours import fstripe_sff, sinespe
from cases.peers import MaterialisedSPE
from timing import command
from timing.isolated import runner
from timing.measure import CHECK_LENGTH, MODES, beyond, call, compare, output_gradient
from torch import Tensor, nn
from tqdm import tqdm

import fastpe
from fastpe.backends import reference
from fastpe.ops.sine_features import sine_features
from fastpe_lab.clocks import alternate, spread
from fastpe_lab.records import Setup, backend, brief, describe, environment, markdown

# positions of the piece, from all different to nearly all the same
POSITIONS = ("time", "bar", "chord", "phrase")


def fused(encoding: nn.Module, positions: Tensor, group: bool, used: str) -> Model:
    """Return our features, with equal positions grouped or not."""
    learned, wide = list(encoding.parameters()), deepcopy(encoding).double()

    def forward(x: Tensor) -> Tensor:
        sines = encoding.make_maps()[0]
        at = positions[:, : x.shape[1]]
        return sine_features(x, at, sines, group=group, backend=used)

    def exact(x: Tensor) -> Tensor:
        return reference.sine_features(x, positions[:, : x.shape[1]], wide.make_maps()[0])

    return Model(forward, exact, learned, list(wide.parameters()))


def models(encoding: nn.Module, positions: Tensor, setup: Setup) -> dict[str, Model]:
    """Return {provider: model}, after a comparison of ours with float64."""
    used = backend(setup)
    if used == "reference":
        raise RuntimeError(f"no fused features here: {fastpe.available_backends()}")
    rows = {
        "ungrouped": fused(encoding, positions, False, used),
        "grouped": fused(encoding, positions, True, used),
    }
    for name, model in rows.items():
        error = beyond(compare(model, [setup.inputs()[0][:, :CHECK_LENGTH]]), setup.dtype)
        if error:
            raise ArithmeticError(f"{name}: {error}")
    if isinstance(encoding, fastpe.SineSPE):
        spe = MaterialisedSPE(setup)

        def codes(x: Tensor) -> Tensor:
            return (x[..., None] * spe.codes(x.shape[1])[0]).sum(-2)

        rows["codes"] = Model(codes, codes, spe.parameters[:])
    return rows


def measure(setup: Setup, field: str, seconds: float) -> dict:
    """Return {mode: {provider: times}} for a field of positions, or for SineSPE's if it is ""."""
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    make = fstripe_sff if field else sinespe
    encoding = make(setup.head_dim, setup.heads).to(setup.device).eval()
    labels = getattr(setup.piece(), field or "time")
    positions = torch.from_numpy(labels).to(setup.device).double()[None, :, None]
    rows, x = models(encoding, positions, setup), setup.inputs()[0]
    with torch.no_grad():
        dy = output_gradient(rows["grouped"].forward(x))
    result: dict = {"unique": len(np.unique(labels))}
    for mode in MODES:
        calls = {name: call(model, [x], mode, dy) for name, model in rows.items()}
        times = alternate(calls, setup.device, seconds)
        result[mode] = {name: spread(t) for name, t in times.items()}
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a row was wrong or failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repeats of a row")
    args = parser.parse_args(argv)
    command.check(parser, args, "lengths")
    isolated, records = runner(args.device), []
    lines = command.Lines(args.out / "features.jsonl")
    rows = [(length, field) for length in args.lengths for field in ("", *POSITIONS)]
    for length, field in tqdm(rows, unit="row"):
        setup = command.setup(args, length)
        record = {"row": f"F-StrIPE:SFF, {field}" if field else "SineSPE, time"}
        record |= asdict(setup) | environment(setup)
        records.append(lines.write(record | isolated(measure, setup, field, args.seconds)))
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
            cells = [r["row"], str(r["length"]), brief(r["length"] / r["unique"]), mode]
            cells += [
                brief(ms[name]) if name in ms else "" for name in ("ungrouped", "grouped", "codes")
            ]
            cells.append(brief(ms["ungrouped"] / ms["grouped"]) + "x")
            best = min(ms["grouped"], ms["ungrouped"])
            lines.append([*cells, brief(ms["codes"] / best) + "x" if "codes" in ms else ""])
    errors = command.errors(records, "row", "length")
    return "\n".join([markdown(lines), *errors, "", describe(records[-1])])


if __name__ == "__main__":
    sys.exit(main())
