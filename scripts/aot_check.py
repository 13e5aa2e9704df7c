#!/usr/bin/env python
"""Compile every GPU kernel, as it is launched, for cards that are not here; no driver is needed.

    python scripts/aot_check.py                   sm_80, sm_90, sm_100
    python scripts/aot_check.py --arch gfx942     for information

The backend's own launchers run on tensors without memory; what they would launch is compiled.
Prints registers, spilled bytes, shared memory and tensor-core instructions; spills over a budget
fail.
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
from dataclasses import dataclass, field
from pathlib import Path

# the gate must see the compiler, whatever the tests have set
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastpe
from fastpe.backends import triton as backend
from fastpe.backends.triton import launch_features, launch_scan
from fastpe.ops import ScanOptions

# bytes of spills that are accepted, by architecture: none on the one that is tuned for
BUDGET = {"80": 0, "90": 0, "100": 0}
# shared memory of one program, bytes
SHARED = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10}
ENCODINGS = {
    "none": None,
    "rope": fastpe.RoPE,
    "rope-half": lambda d, h: fastpe.RoPE(d, h, interleaved=False),
    "ropepool": fastpe.RoPEPool,
}
SINES = {
    "sinespe": lambda d, h: fastpe.SineSPE(d, h, num_realizations=64, seed=0),
    "fstripe-pooled": fastpe.FStripe,
    "fstripe-unpooled": lambda d, h: fastpe.FStripe(d, h, pool=False),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""Element types by dtype."""


@dataclass(frozen=True)
class Name:
    """A device function by its name, since functions do not travel to other processes."""

    module: str
    name: str

    @classmethod
    def of(cls, value: object) -> object:
        """Return a function's name, anything else as it is."""
        return cls(value.__module__, value.__name__) if isinstance(value, JITFunction) else value

    @staticmethod
    def resolve(value: object) -> object:
        """Return what `of` was given."""
        return getattr(sys.modules[value.module], value.name) if isinstance(value, Name) else value


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled: the same for every length and batch."""

    kernel: Name
    case: str = field(compare=False)
    signature: tuple
    constants: tuple
    attrs: tuple
    options: tuple


class Recorder:
    """Stands in a kernel's place and notes what it is launched with."""

    def __init__(self, kernel: JITFunction, launches: dict) -> None:
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names
        self.case = ""

    def __getitem__(self, grid: tuple) -> Recorder:
        return self

    def __call__(
        self, *args: object, num_warps: int = 4, num_stages: int = 1, **meta: object
    ) -> None:
        """Note the types, the constants, and which numbers are multiples of 16."""
        signature, constants, attrs = [], [], []
        values = dict(zip(self.arg_names, args, strict=False)) | meta
        for i, (name, param) in enumerate(zip(self.arg_names, self.kernel.params, strict=True)):
            value = values[name]
            one = type(value) is int and value == 1 and not param.do_not_specialize
            if param.is_constexpr or one:
                signature.append((name, "constexpr"))
                constants.append(((i,), Name.of(value)))
                continue
            if isinstance(value, torch.Tensor):
                signature.append((name, "*" + TYPES[value.dtype]))
                aligned = True  # as torch allocates
            else:
                signature.append((name, "i64" if value >= 2**31 else "i32"))
                aligned = value % 16 == 0 and not param.do_not_specialize
            if aligned:
                attrs.append(((i,), (("tt.divisibility", 16),)))
        name = Name.of(self.kernel)
        options = (("num_warps", num_warps), ("num_stages", num_stages))
        launch = Launch(name, self.case, *map(tuple, (signature, constants, attrs)), options)
        self.launches.setdefault(launch, launch)


def launches(dtypes: list[torch.dtype], widths: list[tuple[int, int]]) -> list[Launch]:
    """Return what the launchers compile for these dtypes, D and E."""
    found: dict[Launch, Launch] = {}
    recorders = []
    for module in (launch_scan.scan, launch_scan.scan_backward, launch_features.features):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders.append(Recorder(getattr(module, name), found))
            setattr(module, name, recorders[-1])
    launch_scan.processors = lambda device: 132
    for dtype in dtypes:
        for d, e in widths:
            for name, make in (ENCODINGS | SINES).items():
                if backend.unsupported(torch.device("cuda"), dtype, (d, d, e)):
                    continue
                for recorder in recorders:
                    recorder.case = f"{name} {TYPES[dtype]} D={d} E={e}"
                trace(name, make, dtype, d, e)
    for recorder in recorders:
        setattr(sys.modules[recorder.kernel.__module__], recorder.kernel.__name__, recorder.kernel)
    return list(found)


def trace(name: str, make: object, dtype: torch.dtype, d: int, e: int) -> None:
    """Run forward and backward of one encoding on tensors without memory."""
    h, t = 8, 4096
    encoding = make(d, h) if make else None
    maps = None if encoding is None else encoding.position_maps(torch.device("cpu"))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    positions = empty(1, t, 1, dtype=torch.float64)
    if name in SINES:
        sines = maps[0]._replace(
            **{
                n: x.detach().to("meta")
                for n, x in maps[0]._asdict().items()
                if isinstance(x, torch.Tensor)
            }
        )
        x = empty(4, t, h, d)
        backend.phase_features(x, positions, sines, True)
        y = empty(4, t, h, sines.feature_dim)
        backend.phase_features_backward(y, x, positions, sines, True, [True, False] + [True] * 4)
        return
    rotation = None if maps is None else maps[0]
    options = ScanOptions(
        feature_map="elu1",
        normalize="sum",
        eps=1e-6,
        interleaved=rotation is not None and rotation.interleaved,
        pool=rotation is not None and rotation.pool,
        map_first=True,
        scale=1.0 if rotation is None else rotation.scale,
        chunk=0,
        backend="triton",
    )
    learned = encoding is not None and bool(list(encoding.parameters()))
    where = (None, None) if rotation is None else (positions, rotation.freq.detach().to("meta"))
    inputs = empty(1, t, h, d), empty(1, t, h, d), empty(1, t, h, e), None, None, *where
    o, den, _, _ = backend.causal_dot(*inputs, options)
    needs = [True, True, True, False, False, False, learned]
    backend.causal_dot_backward((o, None, None), inputs, options, o, den, needs)


@contextlib.contextmanager
def captured(path: str) -> object:
    """Send what the process prints, its children's output too, to a file."""
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
    """Compile a launch and return what the compiler says of it."""
    target = (
        GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
    )
    source = triton.compiler.ASTSource(
        Name.resolve(launch.kernel),
        dict(launch.signature),
        {k: Name.resolve(v) for k, v in launch.constants},
        {k: [list(i) for i in v] for k, v in launch.attrs},
    )
    start = time.time()
    with tempfile.NamedTemporaryFile() as log:
        with captured(log.name):
            kernel = triton.compile(source, target=target, options=dict(launch.options))
        text = Path(log.name).read_text()
    if arch.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]) * 4
        tensor = len(re.findall(r"v_mfma", code))
    else:
        registers = int(re.findall(r"Used (\d+) registers", text)[-1])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
        tensor = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"]))
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "tensor": tensor,
        "seconds": time.time() - start,
    }


def main() -> int:
    """Compile, print the table, and return how many kernels are over the budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"])
    parser.add_argument("--widths", nargs="+", default=["64x64", "128x128", "256x256"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="kernels and cases with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what is cached prints no log
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    widths = [tuple(map(int, w.split("x"))) for w in args.widths]
    found = launches([getattr(torch, d) for d in args.dtypes], widths)
    found = [x for x in found if args.only in f"{x.kernel.name} {x.case}"]
    failed = 0
    print(f"triton {triton.__version__}, {len(found)} kernels for {', '.join(args.arch)}")
    print(
        f"{'kernel':26}{'case':34}{'arch':>7}{'regs':>6}{'spill':>7}{'shared':>8}{'mma':>5}{'s':>6}"
    )
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(build, x, arch): (x, arch) for x in found for arch in args.arch}
        for job in as_completed(jobs):
            launch, arch = jobs[job]
            name = launch.kernel.name
            try:
                r = job.result()
            except Exception as error:
                while error.__cause__:
                    error = error.__cause__
                print(f"{name:26}{launch.case:34}{arch:>7} {type(error).__name__}: {error}")
                failed += 1
                continue
            over = r["spilled"] > BUDGET.get(arch, 1 << 20)
            over = over or r["shared"] > SHARED.get(arch, 1 << 20)
            failed += over
            print(
                f"{name:26}{launch.case:34}{arch:>7}{r['registers']:>6}{r['spilled']:>7}"
                f"{r['shared']:>8}{r['tensor']:>5}{r['seconds']:>6.1f}{'  FAILED' * over}",
                flush=True,
            )
    print(f"{failed} of {len(jobs)} over the budget" if failed else "all within the budget")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
