"""Whether each backend gives right numbers here at all, each case in a process of its own.

    python benchmarks/smoke.py --device cuda                        a minute at most
    python benchmarks/smoke.py --device cpu --backends cpu reference

Compares output and every gradient of four encodings in two dtypes with float64. A case that crashes
or hangs is an error and does not stop the others. Appends a line to DIR/smoke.jsonl as each case
ends.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from timing.command import OUT, Lines
from timing.isolated import Isolated
from timing.measure import check

import fastpe
from fastpe_lab.clocks import TOLERANCE
from fastpe_lab.records import Setup

ENCODINGS = ("fastpe", "fastpe-rope", "fastpe-sinespe", "fastpe-fstripe-pooled")


def measure(isolated: Isolated, name: str, setup: Setup) -> dict:
    """Return a case's record: its errors against float64, or why there are none."""
    start = time.monotonic()
    found = isolated(check, name, setup, setup.length)
    return {"case": name} | asdict(setup) | {"seconds": time.monotonic() - start} | found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    known = [name for name in fastpe.backends.NAMES if name != "auto"]
    parser.add_argument("--backends", nargs="+", choices=known, default=["triton", "cuda"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(TOLERANCE), default=["bfloat16", "float32"]
    )
    parser.add_argument("--length", type=int, default=333)
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for a process")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if min(args.length, args.jobs) < 1:
        parser.error("--length and --jobs must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the cases; return 1 if one was wrong or failed."""
    args = parse(argv)
    isolated = Isolated(args.seconds, ("triton",))
    setup = Setup(args.length, batch=2, heads=3, head_dim=64, device=args.device)
    lines = Lines(args.out / "smoke.jsonl", anew=False)
    cases = itertools.product(args.backends, args.dtypes, ENCODINGS)
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(measure, isolated, name, replace(setup, backend=backend, dtype=dtype))
            for backend, dtype, name in cases
        ]
        for job in as_completed(jobs):
            row = lines.write(job.result())
            failed += "error" in row
            said = row.get("error") or f"right, errors up to {max(row['check'].values()):.1e}"
            what = f"{row['backend']} {row['dtype']} {row['case']}"
            print(f"{what:45} {row['seconds']:5.1f} s  {said}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} cases are right")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
