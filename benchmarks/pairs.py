"""Cases of seq_scaling.py timed in turn in one process, for ratios that a busy machine spares.

    python benchmarks/pairs.py fastpe fastpe-rope chunked-compile --length 8192

Compares each case with float64, then prints milliseconds and the ratio to the first case, forward
and forward+backward. Appends a line to DIR/pairs.jsonl.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from cases import GPU_CASES
from timing import command
from timing.isolated import runner
from timing.measure import MODES, check, in_turn

from fastpe_lab.records import Setup, describe, environment, markdown


def measure(names: list[str], setup: Setup, seconds: float) -> dict:
    """Return {mode: {case: times}}, by the fastest variant of each case."""
    found = {mode: in_turn(names, setup, mode, seconds) for mode in MODES}
    return {mode: {name: row["ms"] for name, row in rows.items()} for mode, rows in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a case was wrong or failed."""
    parser = command.parser(__doc__)
    parser.add_argument("cases", nargs="+", choices=sorted(GPU_CASES), metavar="CASE")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the repeats of a mode")
    args = parser.parse_args(argv)
    command.check(parser, args, "length")
    setup, isolated = command.setup(args, args.length), runner(args.device)
    for name in args.cases:
        result = isolated(check, name, setup)
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
    command.Lines(args.out / "pairs.jsonl", anew=False).write(record)
    print("\n".join([markdown(lines), "", describe(record)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
