"""Record the kernel, signature, constants and alignment that Triton would compile for a launch.

`recording` replaces every launch. Triton itself specialises the arguments, so compiling a record
gives the entry of Triton's cache that a launch on a card looks for. There are two sources: `traces`
runs the launchers on tensors without memory, record_gpu_tests.py runs the GPU tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# kernels must be compiled, even if the tests set the interpreter
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastpe
from fastpe.backends import triton as backend
from fastpe.backends.specs import ScanOptions
from fastpe.backends.triton import common

ROOT = Path(__file__).parent.parent
# bytes of shared memory for one program
SHARED = {
    "80": 163 << 10,
    "86": 99 << 10,
    "89": 99 << 10,
    "90": 227 << 10,
    "100": 227 << 10,
    "120": 99 << 10,
}
PROCESSORS = 132
ENCODINGS = {
    "none": None,
    "rope": fastpe.RoPE,
    "rope-half": lambda d, h: fastpe.RoPE(d, h, interleaved=False),
    "ropepool": fastpe.RoPEPool,
    "rope-packed": fastpe.RoPE,  # packed sequences, four heads of q for one of k and v
}
SINES = {
    "sinespe": lambda d, h: fastpe.SineSPE(d, h, num_realizations=64, seed=0),
    "fstripe-pooled": fastpe.FStripe,
    "fstripe-unpooled": lambda d, h: fastpe.FStripe(d, h, pool=False),
}
# batch, tokens and heads of a trace, and of benchmarks/bars.py
SHAPE, BARS = (1, 4096, 8), ((4, 256, 16), (4, 8192, 16))
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Name:
    """The name of a device function, since functions cannot be pickled."""

    module: str
    name: str

    @classmethod
    def of(cls, value: object) -> object:
        """Return a function's name, anything else unchanged."""
        return cls(value.__module__, value.__name__) if isinstance(value, JITFunction) else value

    @staticmethod
    def resolve(value: object) -> object:
        """Return the function of a name; the inverse of `of`."""
        return getattr(sys.modules[value.module], value.name) if isinstance(value, Name) else value


@dataclass(frozen=True)
class Launch:
    """A kernel to compile; the same for every length and batch.

    Args:
        kernel: The kernel's name.
        signature: Types of the arguments by name.
        constants: Values of constants by index.
        attrs: Attributes of arguments, such as alignment, by index.
        options: Warps and stages.
        case: The first trace or test that launches it.
        group: Dtype and D of a trace, for its budget.
    """

    kernel: Name
    signature: tuple
    constants: tuple
    attrs: tuple
    options: tuple
    case: str = field(compare=False)
    group: tuple[str, int] | None = field(compare=False, default=None)

    def source(self) -> triton.compiler.ASTSource:
        """Return the source for triton.compile."""
        return triton.compiler.ASTSource(
            Name.resolve(self.kernel),
            dict(self.signature),
            {at: Name.resolve(x) for at, x in self.constants},
            {at: [list(x) for x in found] for at, found in self.attrs},
        )


class PretendedDriver:
    """A driver without a card, which tells Triton the target."""

    _devices = itertools.count(1)

    def __init__(self, arch: str) -> None:
        self.arch, self.device = arch, next(self._devices)

    def get_current_target(self) -> GPUTarget:
        """Return the target of compilation."""
        return target(self.arch)

    def get_current_device(self) -> int:
        """Return an index unique to this driver, so that drivers share no compiled kernels."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return the default stream; nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")


def target(arch: str) -> GPUTarget:
    """Return Triton's target for an architecture."""
    return GPUTarget("hip", arch, 64) if arch[0] == "g" else GPUTarget("cuda", int(arch), 32)


class Recorder:
    """Unique launches in order; set `case` and `group` before each launch.

    Args:
        missed: True records only launches that are not in Triton's cache, and compiles them.
    """

    def __init__(self, missed: bool = False) -> None:
        self.found: dict[Launch, Launch] = {}
        self.missed, self.hits, self.count = missed, 0, 0
        self.case, self.group = "", None

    def compile(self, source: object, target: GPUTarget, options: dict[str, object]) -> object:
        """Replace triton.compile."""
        if self.missed and _in_cache(source, target, options):
            self.hits += 1
            return source
        launch = Launch(
            Name.of(source.fn),
            tuple(source.signature.items()),
            tuple((at, Name.of(x)) for at, x in source.constants.items()),
            tuple((at, tuple(map(tuple, x))) for at, x in source.attrs.items()),
            tuple((name, options[name]) for name in ("num_warps", "num_stages")),
            self.case,
            self.group,
        )
        self.found.setdefault(launch, launch)
        return launch

    def launch(self, kernel: common.Kernel, grid: tuple, tensors: tuple, numbers: tuple) -> None:
        """Replace `Kernel.__call__`."""
        self.count += 1
        if 0 in grid or max(grid[1:]) > 65535:
            raise ValueError(f"{self.case} launches {kernel.function.__name__} on a grid of {grid}")
        kernel.function.warmup(*tensors, *numbers, grid=grid, **kernel.meta)


_compile = triton.compiler.compile


def _in_cache(source: object, target: GPUTarget, options: dict[str, object]) -> bool:
    found = []
    triton.knobs.compilation.listener = lambda **said: found.append(said["cache_hit"])
    try:
        _compile(source, target=target, options=options)
    finally:
        triton.knobs.compilation.listener = None
    return found[0]


@contextlib.contextmanager
def recording(arch: str, missed: bool = False) -> Iterator[Recorder]:
    """Record every launch as on a card of an architecture, without running it."""
    recorder = Recorder(missed)
    card = common.Card(PROCESSORS, SHARED.get(arch, 64 << 10))
    kept = common.Kernel.__call__, common.card, triton.compiler.compile
    common.Kernel.__call__ = lambda *args: recorder.launch(*args)
    common.card, triton.compiler.compile = lambda device: card, recorder.compile
    driver.set_active(PretendedDriver(arch))
    try:
        yield recorder
    finally:
        common.Kernel.__call__, common.card, triton.compiler.compile = kept
        driver.set_active(None)


def traces(
    arch: str, dtypes: list[torch.dtype], widths: list[tuple[int, int]],
    names: Iterable[str] = tuple(ENCODINGS | SINES), shape: tuple[int, int, int] = SHAPE,
    missed: bool = False,
) -> list[Launch]:  # fmt: skip
    """Return the launches for these dtypes, D and E, from tensors without memory."""
    with recording(arch, missed) as recorder:
        recorder.case, recorder.group = "noise", ("", 0)
        key = torch.empty((), dtype=torch.int64, device="meta")
        backend.philox_normal(key, key, 0, 0, (512, 20, 64), torch.float32)
        for dtype in dtypes:
            for d, e in widths:
                if backend.too_wide((d, d, e), dtype, key.device):
                    continue
                for name in names:
                    if name == "rope-packed" and d > 128:
                        continue  # forward_kernel spills 48 bytes on sm_90 in 16 bits
                    recorder.case = f"{name} {SHORT[dtype]} D={d} E={e}"
                    recorder.group = SHORT[dtype], d
                    trace(name, dtype, d, e, shape)
    if missed:
        print(f"{recorder.hits} kernels were in the cache, {len(recorder.found)} were not")
    return list(recorder.found)


def trace(name: str, dtype: torch.dtype, d: int, e: int, shape: tuple[int, int, int]) -> None:
    """Run forward and backward of one encoding on tensors without memory."""
    (b, t, h), make = shape, (ENCODINGS | SINES)[name]
    encoding = make(d, h) if make else None
    maps = None if encoding is None else encoding.make_maps(torch.device("cpu"))

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
        backend.sine_features(x, positions, sines, True)
        y = empty(4, t, h, sines.feature_dim)
        backend.sine_features_backward(y, x, positions, sines, True, [True, False] + [True] * 4)
        return
    rotation = None if maps is None else maps[0]
    options = ScanOptions(
        feature_map="elu1",
        normalize="sum",
        eps=1e-6,
        interleaved=rotation is not None and rotation.interleaved,
        pool=rotation is not None and rotation.pool,
        map_first=rotation is None or rotation.map_first,
        scale=1.0 if rotation is None else rotation.scale,
        chunk=0,
        backend="triton",
    )
    learned = encoding is not None and bool(list(encoding.parameters()))
    where = (None, None) if rotation is None else (positions, rotation.freq.detach().to("meta"))
    shared, ranges = h, None
    if name == "rope-packed":
        shared, ranges = h // 4, empty(3, 2, dtype=torch.int64)
    keys_values = empty(b, t, shared, d), empty(b, t, shared, e)
    inputs = empty(b, t, h, d), *keys_values, None, None, *where, ranges
    o, den, _, _ = backend.causal_dot(*inputs, options)
    needs = [True, True, True, False, False, False, learned]
    backend.causal_dot_backward((o, None, None), inputs, options, o, den, needs)


def from_tests(arch: str, missed: bool = False) -> list[Launch]:
    """Return the launches of the GPU tests, which run in another process on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        environment = os.environ | {
            "FASTPE_RECORD": f"{arch}:{int(missed)}:{file}",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        tests = [str(x) for x in sorted((ROOT / "tests" / "gpu").glob("test_gpu*.py"))]
        # in one process, and without plugins that may warn
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu"]
        command += ["-p", "record_gpu_tests", *tests]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return pickle.loads(file.read_bytes())
