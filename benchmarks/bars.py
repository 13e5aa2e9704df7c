"""How close the kernels come to the card's limits: bars on ratios of cases timed in turn.

    python benchmarks/bars.py --device cuda --backend triton
    python benchmarks/bars.py --device cuda --parts scan --seconds 0.2

The floor is the time to move q, k, v and o once at the rate of a copy on the card; forward+backward
moves 11 tensors of that size. Every case is compared with float64 first. Times are the device's,
with everything launched ahead. The crossover is also given with the time to launch ("with the
host"). Writes each time, each memory and each bar to DIR/bars.jsonl at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass

import torch
from timing import command
from timing.measure import BASELINE, FORWARD, MODES, TRAINING
from timing.turns import Bench, Key, ratio

from fastpe_lab.clocks import clock
from fastpe_lab.records import Setup, describe, environment, markdown

NONE, ROPE, SPE, CODES = "fastpe", "fastpe-rope", "fastpe-sinespe", "spe-codes"
# tensors moved: q, k, v and o; the backward reads q, k, v and do, and writes three gradients
UNITS = {FORWARD: 4, TRAINING: 11}
FLOOR = {FORWARD: 0.45, TRAINING: 0.33}
# for the first and the second of --bar-lengths
OVER_FLASH, SPE_OVER_FLASH = (6.0, 20.0), (1.5, 5.0)
OVER_CODES = (20.0, 50.0)  # in time, in memory
ROTATION, CLIFF, CROSSOVER = 1.1, 2.0, 1024


@dataclass(frozen=True)
class Bar:
    """One line of the result.

    Args:
        case: the ratio that was measured.
        mode: forward or forward+backward.
        limit: the target.
        measured: the ratio found, or None if there is none.
        least: whether the limit is the least value allowed, or the largest.
        unit: "%", "x" or "tokens".
        note: the reason for None, or a remark.
    """

    case: str
    mode: str
    limit: float
    measured: float | None
    least: bool = True
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether there is a measured value, and the limit allows it."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.least else self.measured <= self.limit

    def row(self) -> list[str]:
        """Return the cells of the table."""
        found = "none" if self.measured is None else self._text(self.measured)
        sign = ">=" if self.least else "<="
        cells = [self.case, self.mode, f"{sign} {self._text(self.limit)}", found]
        return [*cells, "met" if self.met else "NOT MET"]

    def _text(self, x: float) -> str:
        if self.unit == "tokens":
            return f"{x:.0f}"
        return f"{100 * x:.1f} %" if self.unit == "%" else f"{x:.3g}x"


def scan_bars(bench: Bench, args: argparse.Namespace) -> list[Bar]:
    """Return the scan's bars: the floor, the cost of a rotation, FlashAttention."""
    rates = copy_rate(args.device, int(args.copy * 1e9))
    rate = statistics.median(rates)
    bench.record("copy", size=int(args.copy * 1e9), bytes_per_second=rates)
    print(f"copy: {rate / 1e12:.3g} TB/s, {args.copy:g} GB read and written", flush=True)
    bars: list[Bar] = []
    for width in args.widths[:2]:
        ours = [(NONE, width), (ROPE, width)]
        keys = [(BASELINE, width), *ours, *((name, width) for name in args.peers)]
        for i, length in enumerate(args.bar_lengths):
            for mode in MODES:
                times, at = bench.turns(keys, length, mode), f"T={length} D={width}"
                floor = 1e3 * UNITS[mode] * bytes_of(bench.setup, length, width) / rate
                for key in ours:
                    ms, case = times[key], f"{key[0]} of the floor, {at}"
                    x, note = (None, ms) if isinstance(ms, str) else (floor / ms, "")
                    bars.append(Bar(case, mode, FLOOR[mode], x, unit="%", note=note))
                    if mode == FORWARD:
                        x, note = ratio(times, keys[0], key)
                        case = f"{key[0]} over flash, {at}"
                        bars.append(Bar(case, mode, OVER_FLASH[i], x, note=note))
                x, note = ratio(times, *ours[::-1])
                case = f"{ROPE} of {NONE}, {at}"
                bars.append(Bar(case, mode, ROTATION, x, least=False, note=note))
    return bars


def crossover_bars(bench: Bench, args: argparse.Namespace) -> list[Bar]:
    """Return the shortest length from which on forward+backward is faster than FlashAttention."""
    keys = [(BASELINE, args.head_dim), (NONE, args.head_dim), (ROPE, args.head_dim)]
    bars = []
    for host in (False, True):
        ratios: dict[Key, dict[int, float]] = {key: {} for key in keys[1:]}
        reason = ""
        for length in args.lengths:
            # the forward alone has no bar, but a record
            bench.turns(keys, length, FORWARD, host)
            times = bench.turns(keys, length, TRAINING, host)
            for key in keys[1:]:
                x, why = ratio(times, keys[0], key)
                reason = reason or why
                if x:
                    ratios[key][length] = x
        for key in keys[1:]:
            found = None
            # go down from the longest length to the first one where it is slower
            for length in sorted(ratios[key], reverse=True):
                if ratios[key][length] <= 1:
                    break
                found = length
            note = ", with the host" if host else ""
            known = ", ".join(f"{n}: {x:.2f}x" for n, x in ratios[key].items())
            bars.append(
                Bar(
                    f"{key[0]} faster than flash from T=, D={args.head_dim}{note}",
                    *(TRAINING, CROSSOVER - 1, found, False, "tokens", reason or known),
                )
            )
    return bars


def spe_bars(bench: Bench, args: argparse.Namespace) -> list[Bar]:
    """Return SineSPE's bars: over FlashAttention, and over codes in time and memory."""
    width, bars = args.head_dim, []
    keys = [(BASELINE, width), (SPE, width), (CODES, width)]
    for i, length in enumerate(args.bar_lengths):
        for mode in MODES:
            times, at = bench.turns(keys, length, mode), f"T={length} D={width}"
            x, note = ratio(times, keys[0], keys[1])
            bars.append(Bar(f"{SPE} over flash, {at}", mode, SPE_OVER_FLASH[i], x, note=note))
            x, note = ratio(times, keys[2], keys[1])
            mb = {name: bench.memory(name, length, mode) for name in (SPE, CODES)}
            known = "; ".join(
                f"{name}: {y if isinstance(y, str) else f'{y:.1f} MB'}" for name, y in mb.items()
            )
            # codes may exceed the memory beyond the first length
            if i == 0 or x:
                bars.append(Bar(f"{SPE} over codes, {at}", mode, OVER_CODES[0], x, note=note))
            x = None
            if not any(isinstance(y, str) for y in mb.values()):
                x = mb[CODES] / max(mb[SPE], 0.1)
            if i == 0 or x:
                case = f"memory of {CODES} of that of {SPE}, {at}"
                bars.append(Bar(case, mode, OVER_CODES[1], x, note=known))
            else:
                print(f"{at}, {mode}: {known}", file=sys.stderr)
    return bars


def cliff_bars(bench: Bench, args: argparse.Namespace) -> list[Bar]:
    """Return how much longer a byte takes at the widest head than at half its width."""
    narrow, wide = args.widths[1:3]
    length, bars = args.bar_lengths[0], []
    for mode in MODES:
        times = bench.turns([(n, d) for n in (NONE, ROPE) for d in (narrow, wide)], length, mode)
        for name in (NONE, ROPE):
            x, note = ratio(times, (name, wide), (name, narrow))
            x = x * narrow / wide if x else x
            case = f"{name}, a byte at D={wide} of one at D={narrow}, T={length}"
            bars.append(Bar(case, mode, CLIFF, x, least=False, note=note))
    return bars


PARTS = {"scan": scan_bars, "spe": spe_bars, "cliff": cliff_bars, "crossover": crossover_bars}


def bytes_of(setup: Setup, length: int, width: int) -> int:
    """Return the bytes of one tensor among q, k, v and o."""
    return setup.batch * length * setup.heads * width * getattr(torch, setup.dtype).itemsize


def copy_rate(device: str, size: int, repeats: int = 20) -> list[float]:
    """Return the bytes a second that copies on the device read and write together.

    Args:
        device: "cpu" or "cuda".
        size: bytes of the tensor that is copied.
        repeats: number of copies that are timed, after two more that are not.
    """
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    watch = clock(device, host=False)

    def copy() -> None:
        target.copy_(source)

    times = [watch(copy) for _ in range(repeats + 2)][2:]
    return [2 * 4 * source.numel() / (ms * 1e-3) for ms in times]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = command.parser(__doc__, batch=4, heads=16, dtype="bfloat16", device="cuda")
    lengths = [256, 512, 768, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="for the crossover")
    parser.add_argument("--bar-lengths", type=int, nargs=2, default=[8192, 32768])
    parser.add_argument("--widths", type=int, nargs=3, default=[64, 128, 256], help="head dims")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=0.5, help="for cases that take turns")
    parser.add_argument("--gate", type=int, default=1000, help="tokens compared with float64")
    parser.add_argument("--copy", type=float, default=2.0, metavar="GB", help="size of the copy")
    args = parser.parse_args(argv)
    command.check(parser, args, "lengths", "bar_lengths", "widths", "gate")
    args.peers = () if args.device == "cpu" else ("sdpa-cudnn", "fla", "fla-rope")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 3 if a bar is not met or could not be measured."""
    args = parse(argv)
    path, setup = args.out / "bars.jsonl", command.setup(args, max(args.bar_lengths))
    bench = Bench(setup, args.seconds, args.gate, path)
    bars: list[Bar] = []
    for part in args.parts:
        found = PARTS[part](bench, args)
        for bar in found:
            bench.lines.write({"kind": "bar", **asdict(bar), "met": bar.met})
        rows = [["case", "mode", "bar", "measured", ""], *(bar.row() for bar in found)]
        print(markdown(rows), flush=True)
        bars += found
    print("\n".join(f"- {bar.case}, {bar.mode}: {bar.note}" for bar in bars if bar.note))
    print(describe(asdict(setup) | environment(setup)))
    return 0 if all(bar.met for bar in bars) else 3


if __name__ == "__main__":
    sys.exit(main())
