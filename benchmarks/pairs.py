"""Cases of seq_scaling.py in turn in one process: ratios that allocation and other guests spare.

    python benchmarks/pairs.py fastpe fastpe-rope chunked-compile --length 8192

Prints milliseconds and the ratio to the first case, forward and forward+backward, after a check
of each against float64. Writes DIR/pairs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import options
import report
import torch
from cases import GPU_CASES, TABLES
from harness import MODES, Setup, alternate, call, check, environment, find, output_gradient, spread
from isolated import runner


def measure(names: list[str], setup: Setup, seconds: float) -> dict:
    """Return {mode: {case: times}}, the fastest variant of each case."""
    torch.set_num_threads(setup.threads)
    inputs = setup.inputs()
    do = output_gradient(inputs[2])
    cases = {n: find(TABLES[setup.device], n) for n in names}
    models = {(n, v): case.build(setup, v) for n, case in cases.items() for v in case.variants}
    result = {}
    for mode in MODES:
        calls = {key: call(model, inputs, mode, do) for key, model in models.items()}
        times = {key: spread(t) for key, t in alternate(calls, setup.device, seconds).items()}
        result[mode] = {
            n: min((t for (m, _), t in times.items() if m == n), key=lambda t: t["median"])
            for n in names
        }
    return result


def main() -> int:
    """Run the benchmark; return 1 if a case was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=sorted(GPU_CASES), metavar="CASE")
    parser.add_argument("--length", type=int, default=8192)
    options.add(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the repeats of a mode")
    args = parser.parse_args()
    options.check(parser, args, "length")
    setup, isolated = options.setup(args, args.length), runner(args.device)
    for name in args.cases:
        result = isolated(check, TABLES[args.device], name, setup)
        if "error" in result:
            print(f"{name}: {result['error']}", file=sys.stderr)
            return 1
    times = isolated(measure, args.cases, setup, args.seconds)
    if "error" in times:
        print(times["error"], file=sys.stderr)
        return 1
    first = args.cases[0]
    lines = [["case", *(f"{mode}, ms" for mode in MODES), *(f"of {first}" for _ in MODES)]]
    for name in args.cases:
        ms = [times[mode][name]["median"] for mode in MODES]
        ratios = [times[mode][name]["median"] / times[mode][first]["median"] for mode in MODES]
        lines.append([name, *(f"{x:.1f}" for x in ms), *(f"{x:.2f}x" for x in ratios)])
    record = asdict(setup) | environment(setup) | {"cases": times}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print("\n".join([report.markdown(lines), "", report.describe(record)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
