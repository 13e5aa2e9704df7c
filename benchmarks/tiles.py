"""Search the tiles of the scan's Triton kernels on the card at hand.

    python benchmarks/tiles.py                                  a minute
    python benchmarks/tiles.py --seconds 600 --roles forward    more of them, of one kernel

A role is a kernel of the scan. A tile says how many tokens and columns a program takes at a time,
with how many warps and how many loads ahead (`causal_dot_launch.blocks`), and here also into how
many segments a row is cut. Each candidate first runs in a process of its own, where its results are
compared with those of the default tile. The right ones are timed in this process. Appends a line to
DIR/tiles.jsonl for each candidate at once, and prints the best of each role.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from timing import command
from timing.isolated import Isolated
from timing.turns import gaussian
from torch import Tensor

import fastpe
from fastpe.backends import triton as backend
from fastpe.backends.specs import ScanOptions
from fastpe.backends.triton import causal_dot_launch
from fastpe_lab.clocks import TOLERANCE, clock, relative_error
from fastpe_lab.records import Setup, environment, markdown

ENCODINGS = ("none", "rope")
# {role: (the block of columns that `columns` sets, the inputs whose gradients run the kernel)};
# inputs are the numbers of q, k and v, and the forward runs kernels without any
ROLES = {
    "forward": ("be", ()),
    "grad_q": ("bw", (0,)),
    "grad_kv": (None, (1, 2)),
    "grad_k": ("bw", (1,)),
    "grad_v": ("be", (2,)),
    "state": ("be", ()),
}
# modules that are imported once for all processes
PRELOAD = ("triton", "fastpe.backends.triton")
# part of the time for the comparisons; the rest is for timing
COMPARING = 0.65


class Tile(NamedTuple):
    """A candidate; 0 leaves the choice to the launcher.

    Attributes:
        c: number of tokens in a tile.
        columns: number of columns that a program makes.
        warps: number of warps in a program.
        stages: number of loads ahead.
        segments: number of parts of a row that run at a time.
    """

    c: int = 0
    columns: int = 0
    warps: int = 0
    stages: int = 0
    segments: int = 0


class Group(NamedTuple):
    """The kernel, encoding and width that share a tile."""

    role: str
    encoding: str
    head_dim: int


# a simulation of the machine code found these fastest; none is measured; they are tried first
PREDICTED = {
    Group("forward", "none", 64): [Tile(64, 64, 4, 3, 4), Tile(64, 64, 4, 2, 4)],
    Group("forward", "rope", 64): [Tile(32, 64, 4, 3, 4)],
    Group("forward", "none", 128): [Tile(32, 128, 8, 2), Tile(16, 128, 8, 3)],
    Group("forward", "rope", 128): [Tile(16, 64, 4, 2), Tile(32, 64, 8, 3)],
    Group("grad_q", "none", 64): [Tile(32, 64, 4, 2, 4)],
    Group("grad_kv", "none", 64): [Tile(64, 0, 4, 2)],
}


def groups(args: argparse.Namespace) -> list[Group]:
    """Return the groups to search, the most valuable first."""
    found = []
    for role in args.roles:
        for d, encoding in itertools.product(args.head_dims, ENCODINGS):
            # one kernel makes both gradients if a program holds the whole state
            if role in ("grad_kv", "grad_k", "grad_v") and (role == "grad_kv") != (d <= 64):
                continue
            found.append(Group(role, encoding, d))
    return found


def candidates(group: Group) -> list[Tile]:
    """Return the tiles to try, the most promising first."""
    full = group.head_dim
    columns = (full, full // 2) if ROLES[group.role][0] else (0,)
    grid = itertools.product((32, 64, 16), columns, (4, 8), (2, 3))
    tiles = PREDICTED.get(group, []) + [Tile(segments=n) for n in (4, 2, 3, 1, 6, 8)]
    return list(dict.fromkeys(tiles + [Tile(*sizes) for sizes in grid]))


@contextlib.contextmanager
def override(group: Group, tile: Tile) -> Iterator[None]:
    """Let the launcher take a tile for a role."""
    blocks, segments = causal_dot_launch.blocks, causal_dot_launch.segments
    parts = 1 if group.encoding == "none" else 2

    def chosen(role: str, *args: object, **named: object) -> causal_dot_launch.Blocks:
        found = blocks(role, *args, **named)
        if role != group.role:
            return found
        block = ROLES[role][0]
        fields = {"c": tile.c, "warps": tile.warps, "stages": tile.stages}
        if block and tile.columns:
            # rotated columns count in pairs; a product takes at least 16
            fields[block] = max(tile.columns // (parts if block == "bw" else 1), 16)
        return found._replace(**{name: x for name, x in fields.items() if x})

    def cut(programs: int, t: int, c: int, *more: object) -> tuple[int, int]:
        if not tile.segments:
            return segments(programs, t, c, *more)
        length = -(-t // (tile.segments * c)) * c
        return length, -(-t // length)

    causal_dot_launch.blocks, causal_dot_launch.segments = chosen, cut
    causal_dot_launch._plan.cache_clear()
    try:
        yield
    finally:
        causal_dot_launch.blocks, causal_dot_launch.segments = blocks, segments
        causal_dot_launch._plan.cache_clear()


def prepare(group: Group, setup: Setup) -> Callable[[], list[Tensor]]:
    """Return the call that runs a role, with its results."""
    *inputs, do = gaussian(replace(setup, head_dim=group.head_dim))
    where = None, None
    scan = ScanOptions("elu1", "sum", 1e-6, False, False, True, 1.0, 0, "triton")
    if group.encoding == "rope":
        rotation = fastpe.RoPE(group.head_dim).make_maps(torch.device(setup.device))[0]
        t = torch.arange(setup.length, dtype=torch.float64, device=setup.device)
        where = t[None, :, None], rotation.freq.detach()
        scan = scan._replace(interleaved=rotation.interleaved, map_first=rotation.map_first)
    inputs = (*inputs, None, None, *where, None)
    wanted = ROLES[group.role][1]
    o, den, _, _ = backend.causal_dot(*inputs, scan)
    if not wanted:
        return lambda: list(backend.causal_dot(*inputs, scan))
    needs = [i in wanted for i in range(7)]

    def run() -> list[Tensor]:
        found = backend.causal_dot_backward((do, None, None), inputs, scan, o, den, needs)
        return [found[i] for i in wanted]

    return run


def compare(group: Group, tile: Tile, setup: Setup) -> dict:
    """Return how far a tile's results are from the default's, or the error."""
    with torch.no_grad():
        run = prepare(group, setup)
        expected = run()
        with override(group, tile):
            # fill the memory with NaN, so that a missing write shows
            spoiled = [torch.full_like(x, torch.nan) for x in expected]
            del spoiled
            found, again = run(), run()
    worst = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
    if not worst <= TOLERANCE[setup.dtype][0]:
        return {"error": f"wrong against the default tile: relative error {worst:.1e}"}
    if not all(torch.equal(x, y) for x, y in zip(found, again, strict=True)):
        return {"error": "two runs give different bits"}
    return {"check": worst}


def milliseconds(run: Callable[[], object], device: str, repeats: float) -> float:
    """Return the median time of a call, over about `repeats` milliseconds."""
    if device == "cpu":
        return clock(device)(run)
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=repeats, return_mode="median")


class Search:
    """Compares and times candidates until the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.setup = args, command.setup(args, args.length)
        self.start = time.monotonic()
        self.lines = command.Lines(args.out / "tiles.jsonl", anew=False)
        self.lines.write(asdict(self.setup) | environment(self.setup))
        # {group: {tile: ms}}; the default is Tile()
        self.times: dict[Group, dict[Tile, float]] = {}
        self.failed = 0

    def left(self, part: float = 1.0) -> float:
        """Return the seconds until this part of the time is over."""
        return self.start + part * self.args.seconds - time.monotonic()

    def write(self, group: Group, tile: Tile, **found: object) -> None:
        """Append a line."""
        self.lines.write(group._asdict() | {"tile": tile._asdict()} | found)

    def compared(self) -> list[tuple[Group, Tile]]:
        """Return the candidates that are right, as far as the time allows."""
        lists = [[(g, tile) for tile in candidates(g)] for g in groups(self.args)]
        # the most promising of each group before the second of any
        rows = itertools.zip_longest(*(x[: self.args.most] for x in lists))
        jobs, right = {}, []

        def one(group: Group, tile: Tile) -> dict | None:
            seconds = self.left(COMPARING)
            if seconds < 0:
                return None
            return Isolated(seconds + 4, PRELOAD)(compare, group, tile, self.setup)

        with ThreadPoolExecutor(self.args.jobs) as pool:
            for each in filter(None, itertools.chain(*rows)):
                jobs[pool.submit(one, *each)] = each
            for job in as_completed(jobs):
                found, each = job.result(), jobs[job]
                if found is None:
                    continue
                if "error" in found:
                    self.write(*each, **found)
                    self.failed += 1
                else:
                    right.append(each)
        order = list(jobs.values())
        return sorted(right, key=order.index)

    def measure(self, group: Group, tile: Tile, run: Callable[[], object]) -> None:
        """Time a candidate."""
        with override(group, tile), torch.no_grad():
            ms = milliseconds(run, self.setup.device, self.args.repeats)
        self.times.setdefault(group, {})[tile] = ms
        self.write(group, tile, ms=ms)

    def run(self) -> None:
        """Compare all, then time, so that the card is free for timing."""
        right = self.compared()
        for group in groups(self.args):
            tiles = [tile for g, tile in right if g == group]
            if not tiles or self.left() < 0:
                continue
            call = prepare(group, self.setup)
            # the default is timed twice: the difference is noise
            for tile in (Tile(), *tiles):
                if self.left() > 0:
                    self.measure(group, tile, call)
            self.write(group, Tile(), ms=milliseconds(call, self.setup.device, self.args.repeats))

    def table(self) -> str:
        """Return the best of each group, in markdown."""
        lines = [["role", "encoding", "D", "default, ms", "best, ms", "", "tile", "timed"]]
        for group, times in self.times.items():
            best = min(times, key=times.get)
            fields = {name: x for name, x in best._asdict().items() if x}
            said = ", ".join(f"{name} {x}" for name, x in fields.items()) or "the default"
            ms, least = times[Tile()], times[best]
            cells = [f"{ms:.4g}", f"{least:.4g}", f"{ms / least:.2f}x", said, str(len(times))]
            lines.append([group.role, group.encoding, str(group.head_dim), *cells])
        return markdown(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = command.parser(__doc__, batch=4, heads=16, dtype="bfloat16", device="cuda")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=60.0, help="for everything")
    parser.add_argument("--most", type=int, default=100, help="candidates for a role")
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time")
    parser.add_argument("--repeats", type=float, default=50.0, help="milliseconds for a tile")
    args = parser.parse_args(argv)
    command.check(parser, args, "length", "head_dims", "most", "jobs")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the search; return 1 if nothing was timed."""
    search = Search(parse(argv))
    search.run()
    print(search.table())
    print(f"{search.failed} candidates failed or were wrong: their reasons are in the records")
    return int(not search.times)


if __name__ == "__main__":
    sys.exit(main())
