#!/usr/bin/env python
"""Compile every GPU kernel that fastpe launches, without a card or a driver.

    python scripts/aot_check.py                        sm_80, sm_89, sm_90, sm_100
    python scripts/aot_check.py --tests                the launches of the GPU tests
    python scripts/aot_check.py --tests --sample       one of each kind of them
    python scripts/aot_check.py --arch gfx942          for information

launches.py runs the backend's launchers on tensors without memory, or the GPU tests on the CPU, and
records launches for this script to compile. It prints registers, spilled bytes, shared memory and
tensor-core instructions. It fails if a kernel does not compile, needs more shared memory than the
card has, or spills more than its budget.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import launches
import torch
import triton
from launches import Launch

# Accepted bytes of spills by architecture, dtype and D. Tiles are tuned for sm_90 in 16 bits, where
# almost nothing spills; float32 products of three parts take more registers than there are. On
# sm_100 the scan of packed sequences spills most (88).
BUDGET = {
    ("90", "bf16"): {64: 8, 128: 8, 256: 96},
    ("80", "bf16"): {64: 640, 128: 32, 256: 64},
    ("100", "bf16"): {64: 96, 128: 256, 256: 64},
    ("90", "fp16"): {64: 32, 128: 128},
    ("80", "fp16"): {64: 320, 128: 64},
    ("90", "fp32"): {64: 512, 128: 1536, 256: 24 << 10},
    ("80", "fp32"): {64: 2 << 10, 128: 20 << 10, 256: 32 << 10},
    ("100", "fp32"): {64: 1024, 128: 2 << 10, 256: 32 << 10},
}
# CUDA kernels: the float32 gradient of keys, with its compensated sums, spills one number
CUDA_BUDGET = {"ScanKernel float": 8}
ANY = 1 << 20
# a sample has each combination of these constants once for each kernel and dtype
KINDS = ("ENCODE", "PAIRS", "MAP_FIRST", "NORMALIZE", "MIX"), ("PSI",)
HEAD = f"{'kernel':26}{'case':44}{'arch':>7}{'regs':>6}{'spill':>7}{'shared':>8}{'mma':>5}{'s':>6}"


def sample(found: list[Launch]) -> list[Launch]:
    """Return one launch for each kernel, dtype and combination of KINDS."""
    chosen = {}
    for launch in found:
        names = [name for name, _ in launch.signature]
        constants = {names[at[0]]: x for at, x in launch.constants}
        for kind in KINDS:
            values = tuple(constants.get(name) for name in kind)
            chosen.setdefault((launch.kernel, launch.signature[0][1], kind, values), launch)
    return list(dict.fromkeys(chosen.values()))


def recorded(args: argparse.Namespace, arch: str) -> list[Launch]:
    """Return the launches to compile for an architecture; with --hits, those not in the cache."""
    found = []
    if args.tests:
        found += launches.from_tests(arch, args.hits)
        if args.sample:
            found = sample(found)
    if args.bars:
        for shape in launches.BARS:
            widths = [(d, d) for d in (64, 128, 256)]
            names = "none", "rope", "sinespe"
            found += launches.traces(arch, [torch.bfloat16], widths, names, shape, args.hits)
    if not args.tests and not args.bars:
        widths = [tuple(map(int, w.split("x"))) for w in args.widths]
        dtypes = [getattr(torch, d) for d in args.dtypes]
        found += launches.traces(arch, dtypes, widths, args.encodings)
    return [x for x in dict.fromkeys(found) if args.only in f"{x.kernel.name} {x.case}"]


@contextlib.contextmanager
def captured(path: str) -> object:
    """Redirect the output of this process and its children to a file."""
    sys.stdout.flush()
    before = os.dup(1)
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


def build(launch: Launch, arch: str) -> dict:
    """Compile a launch and return its registers, spills, shared memory, tensor ops and seconds."""
    start = time.time()
    with tempfile.NamedTemporaryFile() as log:
        with captured(log.name):
            kernel = triton.compile(
                launch.source(), target=launches.target(arch), options=dict(launch.options)
            )
        text = Path(log.name).read_text()
    if arch.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]) * 4
        tensor = len(re.findall(r"v_mfma", code))
    else:
        # empty for a kernel that was in the cache
        registers = int((re.findall(r"Used (\d+) registers", text) or [0])[-1])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
        code = kernel.asm.get("ptx", "")
        tensor = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", code))
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "tensor": tensor,
        "seconds": time.time() - start,
    }


def build_cuda(architectures: list[str]) -> int:
    """Compile the CUDA library, print a table of its kernels, return how many spill too much."""
    import setup

    with tempfile.TemporaryDirectory() as folder:
        said = setup.compile_cuda(
            Path(folder) / "cuda.so",
            Path(folder),
            ("-Xptxas", "-v,-warn-spills"),
            tuple(a for a in architectures if not a.startswith("gfx")),
        )
    pattern = (
        r"entry function '\w*?\d+([A-Z]\w*Kernel)(\w*)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores.*?Used (\d+) registers"
    )
    failed = 0
    for name, instance, arch, spilled, registers in re.findall(pattern, said, re.DOTALL):
        dtype = re.search(r"BFloat16|Float16|(?<=^I)[fd]", instance)
        role = re.search(r"RoleE(\d)", instance)
        case = "CUDA C++"
        if dtype:
            case += f" {({'f': 'float', 'd': 'double'}).get(dtype[0], dtype[0])}"
        if role:
            case += f" {('forward', 'grad_q', 'grad_k', 'grad_v')[int(role[1])]}"
        kind = " ".join((name, *case.split()[2:3]))
        over = int(spilled) > CUDA_BUDGET.get(kind, 0)
        failed += over
        print(f"{name:26}{case:44}{arch:>7}{registers:>6}{spilled:>7}{'  FAILED' * over}")
    return failed


def budget(launch: Launch, arch: str) -> int:
    """Return the accepted bytes of spills of a launch on an architecture."""
    if launch.group is None:
        return ANY  # a test, with any width and any map
    dtype, width = launch.group
    return BUDGET.get((arch, dtype), {}).get(width, ANY) if dtype else 0


def build_all(jobs: list[tuple[Launch, str]], workers: int) -> int:
    """Compile launches, print a line for each, return how many fail."""
    failed = 0
    print(HEAD)
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(build, *job): job for job in jobs}
        for done in as_completed(running):
            launch, arch = running[done]
            line = f"{launch.kernel.name:26}{launch.case:44}{arch:>7}"
            try:
                r = done.result()
            except Exception as error:
                while error.__cause__:
                    error = error.__cause__
                print(f"{line} {type(error).__name__}: {error}  FAILED", flush=True)
                failed += 1
                continue
            over = r["spilled"] > budget(launch, arch)
            over = over or r["shared"] > launches.SHARED.get(arch, ANY)
            failed += over
            print(
                f"{line}{r['registers']:>6}{r['spilled']:>7}{r['shared']:>8}{r['tensor']:>5}"
                f"{r['seconds']:>6.1f}{'  FAILED' * over}",
                flush=True,
            )
    return failed


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["80", "89", "90", "100"])
    parser.add_argument("--widths", nargs="+", default=["64x64", "128x128", "256x256"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    known = list(launches.ENCODINGS | launches.SINES)
    parser.add_argument("--encodings", nargs="+", default=known, choices=known)
    parser.add_argument("--tests", action="store_true", help="compile launches of the GPU tests")
    parser.add_argument("--sample", action="store_true", help="only one of each kind of these")
    parser.add_argument("--bars", action="store_true", help="compile those of benchmarks/bars.py")
    parser.add_argument("--only", default="", help="only kernels and cases with this in their name")
    parser.add_argument("--cuda", action="store_true", help="also the CUDA library (needs nvcc)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the code as a cache for a card")
    parser.add_argument("--hits", action="store_true", help="fail unless all is in that cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    """Compile, print the table, and return 1 if a kernel is over its budget."""
    args = parse()
    # use a new cache: cached kernels print no log
    os.environ["TRITON_CACHE_DIR"] = args.keep or tempfile.mkdtemp()
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    jobs = [(launch, arch) for arch in args.arch for launch in recorded(args, arch)]
    if args.hits:
        return min(len(jobs), 1)
    print(f"triton {triton.__version__}, {len(jobs)} kernels for {', '.join(args.arch)}")
    failed = build_all(jobs, args.jobs)
    if args.cuda:
        failed += build_cuda(args.arch)
    print(f"{failed} over the budget" if failed else "all within the budget")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
