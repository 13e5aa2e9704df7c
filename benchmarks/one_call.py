r"""One call of one case after a warm-up, for a profiler.

    ncu --clock-control none --profile-from-start off -k regex:forward_kernel -c 1 \
        python benchmarks/one_call.py fastpe-rope --device cuda --dtype bfloat16

A profiler that waits for cudaProfilerStart sees only the last call.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from cases import GPU_CASES, of_device
from timing import command
from timing.measure import FORWARD, MODES, call
from timing.turns import gaussian


def main(argv: list[str] | None = None) -> int:
    """Run the case twice."""
    parser = command.parser(__doc__)
    parser.add_argument("case", choices=sorted(GPU_CASES), metavar="CASE")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--mode", choices=MODES, default=FORWARD)
    args = parser.parse_args(argv)
    command.check(parser, args, "length")
    setup = command.setup(args, args.length)
    case = of_device(args.device)[args.case]
    *inputs, do = gaussian(setup)
    run = call(case.build(setup, case.variants[-1]), inputs, args.mode, do)
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
