r"""One call of one case, after a warm-up: for a profiler to look at.

    ncu --clock-control none --profile-from-start off -k regex:forward_kernel -c 1 \
        python benchmarks/one_call.py fastpe-rope --device cuda --dtype bfloat16

A profiler that waits for cudaProfilerStart sees the last call alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import options
import torch
from cases import GPU_CASES, TABLES
from harness import FORWARD, MODES, call, find
from turns import gaussian


def main(argv: list[str] | None = None) -> int:
    """Run the case twice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=sorted(GPU_CASES), metavar="CASE")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--mode", choices=MODES, default=FORWARD)
    options.add(parser)
    args = parser.parse_args(argv)
    options.check(parser, args, "length")
    setup = options.setup(args, args.length)
    case = find(TABLES[args.device], args.case)
    *inputs, do = gaussian(setup)
    run = call(case.build(setup, case.variants[-1]), tuple(inputs), args.mode, do)
    run()
    on_gpu = args.device != "cpu"
    with torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext():
        o = run()
        if on_gpu:
            torch.cuda.synchronize()
    assert bool(o.isfinite().all()), "the output is not finite"
    print(f"{args.case}, T={args.length}, {args.mode}: one call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
