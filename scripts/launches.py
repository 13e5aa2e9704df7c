"""Record what Triton would compile for a launch: kernel, signature, constants, alignment.

`recording` stands in the place of every launch; Triton itself says how it takes the arguments, so
that it compiles to the very entry of Triton's cache that a launch on a card looks for. Two sources:
`traces` runs the launchers on tensors without memory, record_gpu_tests.py runs the GPU tests.
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

# the compiler must be seen, whatever the tests have set
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
# shared memory that one program can have, in bytes
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
    "rope-packed": fastpe.RoPE,  # sequences by ranges, four heads for one of the keys and values
}
SINES = {
    "sinespe": lambda d, h: fastpe.SineSPE(d, h, num_realizations=64, seed=0),
    "fstripe-pooled": fastpe.FStripe,
    "fstripe-unpooled": lambda d, h: fastpe.FStripe(d, h, pool=False),
}
# batch, tokens and heads of a trace, and of what benchmarks/bars.py times
SHAPE, BARS = (1, 4096, 8), ((4, 256, 16), (4, 8192, 16))
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


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
    """A kernel as it is compiled: the same for every length and batch.

    Args:
        kernel: Which one.
        signature: Types of the arguments by name.
        constants: Values of constants, by place.
        attrs: What is known of arguments, by place.
        options: Warps and stages.
        case: Who launches it first.
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
        """Return what Triton compiles."""
        return triton.compiler.ASTSource(
            Name.resolve(self.kernel),
            dict(self.signature),
            {at: Name.resolve(x) for at, x in self.constants},
            {at: [list(x) for x in found] for at, found in self.attrs},
        )


class PretendedDriver:
    """A driver of a card that is not here: Triton asks it for the target alone."""

    _devices = itertools.count(1)

    def __init__(self, arch: str) -> None:
        self.arch, self.device = arch, next(self._devices)

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return target(self.arch)

    def get_current_device(self) -> int:
        """Return an index of its own, so that Triton looks for nothing that another compiled."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return what no launch is given."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors are."""
        return torch.device("cpu")


def target(arch: str) -> GPUTarget:
    """Return Triton's name of an architecture."""
    return GPUTarget("hip", arch, 64) if arch[0] == "g" else GPUTarget("cuda", int(arch), 32)


class Recorder:
    """Launches in the order of their first, by `case` and `group` as they are set.

    Args:
        missed: Note only what is not in Triton's cache; it then is compiled.
    """

    def __init__(self, missed: bool = False) -> None:
        self.found: dict[Launch, Launch] = {}
        self.missed, self.hits, self.count = missed, 0, 0
        self.case, self.group = "", None

    def compile(self, source: object, target: GPUTarget, options: dict[str, object]) -> object:
        """Stand in the place of triton.compile."""
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
        """Stand in the place of `Kernel.__call__`."""
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
    """Record every launch as for a card of an architecture; nothing is compiled or run."""
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
    """Return what the launchers compile for these dtypes, D and E, on tensors without memory."""
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
                        continue  # its forward_kernel spills 48 bytes on sm_90, in 16 bits
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
    """Return what the GPU tests launch: they run in a process of their own, on the CPU."""
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
