"""Time and memory of causal attention as sequences grow, on real music: the main benchmark.

    python benchmarks/seq_scaling.py            256 .. 16384 tokens
    python benchmarks/seq_scaling.py --quick    two minutes on two cores
    python benchmarks/seq_scaling.py --baselines all    the literature's systems too
    python benchmarks/seq_scaling.py --device cuda --dtype bfloat16 --batch 4 --heads 16

Every case is compared with float64 before it is timed. Writes DIR/seq_scaling.jsonl, .md and .png.
When the minutes of --quick are over, longer sequences are left out; each case keeps its shortest
one. A case without a row is an error, unless it cannot run here and you did not name it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import cases
import report
from cases import LITERATURE
from timing import command
from timing.isolated import InProcess, Isolated, runner
from timing.measure import BASELINE, MODES, TRAINING, check, measure_time
from timing.memory import measure_memory, total_memory
from tqdm import tqdm

from fastpe_lab.baselines import BASELINES
from fastpe_lab.records import Setup, describe, environment


@dataclass(frozen=True)
class Limits:
    """The most that a measurement may cost.

    Args:
        gigabytes: predicted extra memory of a call.
        call_seconds: predicted time of a call.
        seconds: time to spend on the repeats of a case at one length and mode.
        slow_start: whether cases that compile for long are measured too.
        minutes: time spent on measuring, without checks, after which longer sequences are skipped;
            every case gets its first one. None for no limit.
    """

    gigabytes: float
    call_seconds: float
    seconds: float
    slow_start: bool
    minutes: float | None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = command.parser(__doc__)
    parser.add_argument("--min-len", type=int, help="default 256, 512 with --quick")
    parser.add_argument("--max-len", type=int, help="default 16384, 4096 with --quick")
    names = [name for name in cases.GPU_CASES if name not in LITERATURE]
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"some of {', '.join(names)}")
    parser.add_argument(
        "--baselines",
        nargs="+",
        metavar="NAME",
        default=[],
        help=f"further rows: all, or some of {', '.join(BASELINES)}",
    )
    parser.add_argument("--data", help="an .npz of songs, in place of Bach's prelude")
    parser.add_argument("--song", type=int, default=0, help="which song of --data")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter, no compile")
    parser.add_argument("--max-memory", type=float, metavar="GB", help="default 60%% of all")
    parser.add_argument("--max-seconds", type=float, help="for a call; default 30, 1 with --quick")
    args = parser.parse_args(argv)
    # an explicit 0 is refused below
    if args.min_len is None:
        args.min_len = 512 if args.quick else 256
    args.max_len = args.max_len or (4096 if args.quick else 16384)
    args.max_seconds = args.max_seconds or (1.0 if args.quick else 30.0)
    known = [name for name in cases.of_device(args.device) if name not in LITERATURE]
    for option, allowed in (("cases", known), ("baselines", ["all", *BASELINES])):
        unknown = set(getattr(args, option) or ()) - set(allowed)
        if unknown:
            names = ", ".join(sorted(unknown))
            parser.error(f"--{option} must be of {', '.join(allowed)}, got {names}")
    command.check(parser, args, "min_len")
    if args.max_len < args.min_len:
        parser.error(f"--max-len {args.max_len} is below --min-len {args.min_len}")
    args.max_memory = args.max_memory or 0.6 * total_memory(args.device) / 1e9
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the rows to measure: SDPA, other peers, fastpe's cases, the literature's systems.

    SDPA is first because the others are timed in turn with it, where it is affordable.
    """
    known = cases.of_device(args.device)
    names = [n for n in known if n not in LITERATURE and n in (args.cases or known)]
    names += [n for n in LITERATURE if n in args.baselines or "all" in args.baselines]
    names = list(dict.fromkeys([BASELINE, *names]))
    return sorted(names, key=lambda n: (n != BASELINE, not known[n].ours, n in LITERATURE))


class Sweep:
    """Measures cases at growing lengths, within limits; on the CPU each in a fresh process."""

    def __init__(self, setup: Setup, limits: Limits, isolated: Isolated | InProcess) -> None:
        self.setup, self.limits, self.isolated = setup, limits, isolated
        self.cases = cases.of_device(setup.device)
        self.checked: dict[str, dict] = {}
        # {case: (status, reason)} for cases that are not measured (any more)
        self.out: dict[str, tuple[str, str]] = {}
        # the cases among them that cannot run here, or not with --quick
        self.unavailable: set[str] = set()
        # {(case, mode): (length, ms, extra MB)} at the longest length measured
        self.last: dict[tuple[str, str], tuple[int, float, float]] = {}
        self.baseline: set[tuple[int, str]] = set()
        # time spent on measuring
        self.seconds = 0.0

    def check(self, name: str) -> None:
        """Compare a case with float64, or note why it is skipped."""
        case = self.cases[name]
        reason = case.unavailable(self.setup)
        if not reason and case.slow_start and not self.limits.slow_start:
            reason = "compiles for a minute; not with --quick unless named in --cases"
        if reason:
            self.out[name] = "skipped", reason
            self.unavailable.add(name)
            return
        result = self.isolated(check, name, self.setup)
        if "error" in result:
            self.out[name] = "error", result["error"]
        else:
            self.checked[name] = result["check"]

    def rows(self, name: str, length: int) -> list[dict]:
        """Return a record for each mode."""
        setup = replace(self.setup, length=length)
        if name in self.out:
            status, reason = self.out[name]
            both = {"status": status, "reason": reason}
            return [self._record(name, setup, mode) | both for mode in MODES]
        start = time.monotonic()
        records = self._measure(name, setup)
        self.seconds += time.monotonic() - start
        failed = [r["reason"] for r in records if r["status"] == "error"]
        if failed:
            self.out[name] = "skipped", f"it failed at {length} tokens: {failed[0]}"
        return records

    def _measure(self, name: str, setup: Setup) -> list[dict]:
        reasons = {mode: self._too_much(name, setup, mode) for mode in MODES}
        modes = {
            mode: name != BASELINE and (setup.length, mode) in self.baseline
            for mode, reason in reasons.items()
            if not reason
        }
        times = {}
        if modes:
            seconds = self.limits.seconds
            times = self.isolated(measure_time, name, setup, modes, seconds)
        records = []
        for mode, reason in reasons.items():
            record = self._record(name, setup, mode)
            if reason:
                record |= {"status": "skipped", "reason": reason}
            elif "error" in times:
                record |= {"status": "error", "reason": times["error"]}
            else:
                variant = times[mode]["variant"]
                memory = self.isolated(measure_memory, name, setup, mode, variant)
                record |= {"status": "ok", "check": self.checked[name], **times[mode], **memory}
                if "error" in memory:
                    record |= {"status": "error", "reason": memory["error"]}
                else:
                    self._remember(record)
            records.append(record)
        return records

    def _remember(self, record: dict) -> None:
        name, length, mode = record["case"], record["length"], record["mode"]
        self.last[name, mode] = length, record["ms"]["median"], record["extra_mb"]
        if name == BASELINE:
            self.baseline.add((length, mode))

    def _too_much(self, name: str, setup: Setup, mode: str) -> str | None:
        # the limit that a measurement would exceed
        over = self.limits.minutes and self.seconds > 60 * self.limits.minutes
        if over and (name, mode) in self.last:
            return f"the {self.limits.minutes:g} minutes of --quick are over"
        case, megabytes = self.cases[name], 0.0
        if case.extra_bytes:
            megabytes = case.extra_bytes(setup, mode == TRAINING) / 1e6
        if (name, mode) in self.last:
            length, ms, extra = self.last[name, mode]
            ratio = setup.length / length
            seconds = ms / 1e3 * ratio ** (2 if case.quadratic else 1)
            if not case.extra_bytes:
                megabytes = extra * ratio ** (2 if case.quadratic_memory else 1)
            if seconds > self.limits.call_seconds:
                return (
                    f"predicted {seconds:.1f} s a call, over --max-seconds "
                    f"{self.limits.call_seconds:g}"
                )
        if megabytes > self.limits.gigabytes * 1e3:
            return (
                f"predicted {megabytes / 1e3:.1f} GB, over --max-memory {self.limits.gigabytes:.3g}"
            )
        return None

    def missing(self, records: list[dict], named: Collection[str]) -> list[str]:
        """Return "case, mode: reason" for each case and mode without a row.

        Args:
            records: all records.
            named: cases that must have rows even if they cannot run here.
        """
        found = {(r["case"], r["mode"]) for r in records if r["status"] == "ok"}
        reasons: dict[tuple[str, str], str] = {}
        for r in records:
            expected = r["case"] in named or r["case"] not in self.unavailable
            if expected and (r["case"], r["mode"]) not in found:
                reasons.setdefault((r["case"], r["mode"]), r["reason"])
        return [f"{name}, {mode}: {reason}" for (name, mode), reason in reasons.items()]

    def _record(self, name: str, setup: Setup, mode: str) -> dict:
        case = self.cases[name]
        row = {"case": name, "label": case.label, "ours": case.ours, "mode": mode}
        row |= {"causal": case.causal, "quadratic_memory": case.quadratic_memory}
        return row | asdict(setup) | environment(setup)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a case was wrong, failed or has no row."""
    args = parse(argv)
    setup = command.setup(args, args.max_len, data=args.data, song=args.song)
    try:
        piece = setup.piece()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lengths = [args.min_len * 2**i for i in range(64) if args.min_len * 2**i <= args.max_len]
    names = chosen(args)
    limits = Limits(
        gigabytes=args.max_memory,
        call_seconds=args.max_seconds,
        seconds=0.15 if args.quick else 4.0,
        slow_start=not args.quick or bool(args.cases),
        minutes=(3.2 if args.baselines else 1.6) if args.quick else None,
    )
    found = asdict(setup) | environment(setup)
    print(f"{piece.name}; {describe(found)}", file=sys.stderr)
    sweep = Sweep(setup, limits, runner(args.device))
    records, lines = [], command.Lines(args.out / "seq_scaling.jsonl")
    total = len(names) * (len(lengths) + 1)
    with tqdm(total=total, unit="row", dynamic_ncols=True) as bar:
        for name in names:
            bar.set_description(f"check {name:23}")
            sweep.check(name)
            bar.update()
        # all cases of a length before the next one, so that an aborted run still compares them
        for length in lengths:
            for name in names:
                bar.set_description(f"{length:5} {name:23}")
                records += [lines.write(record) for record in sweep.rows(name, length)]
                bar.update()
    text = report.tables(records)
    print(text)
    page, picture = (lines.path.with_suffix(suffix) for suffix in (".md", ".png"))
    page.write_text(text)
    wrote = [str(lines.path), page.name]
    if report.plot(records, picture):
        wrote.append(picture.name)
    print(f"wrote {', '.join(wrote)}")
    missing = sweep.missing(records, {*(args.cases or ()), *args.baselines})
    for line in missing:
        print(f"error: no row of {line}", file=sys.stderr)
    if not any(record["status"] == "ok" for record in records):
        print("error: nothing was measured", file=sys.stderr)
    return int(bool(missing) or any(record["status"] == "error" for record in records))


if __name__ == "__main__":
    sys.exit(main())
