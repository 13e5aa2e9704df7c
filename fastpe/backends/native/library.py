"""The libraries of csrc/, and the structs of their C ABI (csrc/fastpe.h)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ..tensors import check_devices, contiguous
from . import forks

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class StridedTensor(Structure):
    """FastpeTensor."""

    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_int32)]


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class CausalDot(Structure):
    """FastpeCausalDot."""

    _fields_ = _fields(
        (c_int64, "B T H D E S Hk Hv Hs"),
        (c_void_p, "ranges"),
        (c_int32, "chunk threads isa feature_map normalize"),
        (c_double, "eps"),
        (c_int32, "interleaved pool map_first"),
        (c_double, "scale"),
        (c_int64, "Hf W L Bp"),
        (c_void_p, "freq positions"),
        (StridedTensor, "q k v o"),
        (c_void_p, "den s0 z0 s z lost0 lost"),
        (StridedTensor, "grad_o grad_q grad_k grad_v"),
        (c_void_p, "grad_s grad_z grad_s0 grad_z0 grad_freq grad_positions"),
        (c_void_p, "stream scratch"),
    )


class SineFeatures(Structure):
    """FastpeSineFeatures."""

    _fields_ = _fields(
        (c_int64, "B T H D K J R L Bp Hx"),
        (c_int32, "threads isa pool group"),
        (c_void_p, "positions freq offset gain gate noise"),
        (StridedTensor, "x y grad_y grad_x"),
        (c_void_p, "grad_freq grad_offset grad_gain grad_gate grad_positions"),
        (c_void_p, "stream"),
        (c_int64, "slices"),
        (c_void_p, "scratch"),
    )


class PhiloxNormal(Structure):
    """FastpePhiloxNormal."""

    _fields_ = _fields(
        (c_uint64, "seed"),
        (c_uint32, "step module kind first"),
        (c_int32, "threads isa dtype"),
        (c_int64, "hd rows r"),
        (c_void_p, "out"),
    )


# the number of csrc/fastpe.h and sizes; setup.py computes them, tests/backends/test_abi.py compares
_ABI = [0xD7D07F1F, *map(ctypes.sizeof, (StridedTensor, CausalDot, SineFeatures, PhiloxNormal))]


# their arguments
_FUNCTIONS = {
    "causal_dot": [CausalDot],
    "causal_dot_backward": [CausalDot],
    "step": [CausalDot, SineFeatures, SineFeatures],
    "sine_features": [SineFeatures],
    "sine_features_backward": [SineFeatures],
    "philox_normal": [PhiloxNormal],
}


class Library:
    """A library of csrc/.

    Attributes:
        path: The file, once built.
        prefix: Beginning of the names of its functions.
        needs: The compiler that builds it, and the variable that shows the compiler's error.
        on_gpu: True if it has the CUDA kernels.
    """

    def __init__(self, path: Path, prefix: str, needs: tuple[str, str], on_gpu: bool) -> None:
        self.path, self.prefix, self.needs, self.on_gpu = path, prefix, needs, on_gpu

    @functools.cached_property
    def functions(self) -> ctypes.CDLL:
        """The library, loaded at first use; ImportError where it is of another version."""
        library = ctypes.CDLL(str(self.path))
        if not self._is_ours(library):
            raise ImportError(
                f"{self.path.name} is of another version than the Python code of fastpe: install "
                f"fastpe again, in a clone by `{self.needs[1]}=1 pip install -e .`"
            )
        getattr(library, f"{self.prefix}error").restype = ctypes.c_char_p
        for name, structs in _FUNCTIONS.items():
            function = getattr(library, self.prefix + name, None)
            if function is not None:  # the CUDA library has no noise
                function.argtypes = [ctypes.POINTER(x) for x in structs]
        return library

    def _is_ours(self, library: ctypes.CDLL) -> bool:
        """Return whether a library reads structs as they are filled here."""
        try:
            table = getattr(library, f"{self.prefix}abi")
        except AttributeError:  # from before libraries said
            return False
        table.restype = ctypes.POINTER(c_int64)
        found = table()
        # sizes stand behind the same number only
        return found[0] == _ABI[0] and found[: len(_ABI)] == _ABI

    def unavailable(self) -> str | None:
        """Return why the library cannot be used, or None."""
        if not self.path.exists():
            compiler, variable = self.needs
            return (
                f"{self.path.name} was not built: install {compiler} and run "
                f"`{variable}=1 pip install -e .`, which shows the compiler's error"
            )
        try:
            _ = self.functions
        except OSError as error:
            return f"{self.path.name} does not load: {error}"
        except ImportError as error:
            return str(error)
        return None

    def run(self, name: str, *args: Structure | None) -> None:
        """Call a function on structs; RuntimeError if it fails."""
        if getattr(self.functions, self.prefix + name)(*args):
            message = getattr(self.functions, f"{self.prefix}error")().decode()
            raise RuntimeError(f"{self.prefix}{name}: {message}")


_HERE = Path(__file__).parents[2]
_CXX, _NVCC = "a C++ compiler (g++ or clang++)", "the CUDA toolkit (nvcc)"
CPU = Library(_HERE / "libfastpe_cpu.so", "fastpe_", (_CXX, "FASTPE_CPU"), False)
CUDA = Library(_HERE / "libfastpe_cuda.so", "fastpe_cuda_", (_NVCC, "FASTPE_CUDA"), True)
# by type of device; tests put the CUDA kernels, compiled for the host, in the CPU's place
libraries = {"cpu": CPU, "cuda": CUDA}


def call(
    name: str, device: torch.device, *args: Structure | None, library: Library | None = None
) -> None:
    """Call a function of a library, by default that for the device, on its current stream."""
    library = library or libraries[device.type]
    if device.type == "cpu":
        if forks.forked and args[0].threads > 1:
            # a new thread has no record of OpenMP threads that stayed behind: it gets its own
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(library.run, name, *args).result()
        return library.run(name, *args)
    stream = torch.cuda.current_stream(device).cuda_stream
    for x in args:
        if x is not None:
            x.stream = stream
    if device.index == torch.cuda.current_device():
        return library.run(name, *args)
    with torch.cuda.device(device):
        return library.run(name, *args)


def strided(x: Tensor) -> StridedTensor:
    """Return where the entries of [B, T, H, width] are."""
    return StridedTensor(x.data_ptr(), x.stride(), DTYPES[x.dtype])


def on_one_device(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError as `check_devices`, at the price that a step of decoding can pay."""
    cpu, index = tensors[0].is_cpu, tensors[0].get_device()
    for x in tensors:
        if x is not None and (x.is_cpu is not cpu or x.get_device() != index):
            check_devices(names, tensors)


def point(args: Structure, **tensors: tuple[Tensor | None, torch.dtype]) -> list[Tensor]:
    """Point fields of a struct at tensors, made contiguous and of a dtype; return these to hold."""
    held = []
    for name, (x, dtype) in tensors.items():
        if x is None:
            continue
        if x.dtype is not dtype or not x.is_contiguous() or x.is_neg():
            x = contiguous(x, dtype)
        held.append(x)
        if x.numel():
            setattr(args, name, x.data_ptr())
    return held


ISAS = ("best", "portable", "avx2", "avx512")
# the code path to run, an index into ISAS; tests try each
isa = 0


def thread_count(rows: int) -> int:
    """Return how many threads to use: torch's number, but 1 for one row in a forked process.

    A forked process would start its threads anew.
    """
    return 1 if rows == 1 and forks.forked else torch.get_num_threads()


def unavailable(device: torch.device) -> str | None:
    """Return why the CPU library cannot be used, or None, whatever the device."""
    return CPU.unavailable()


def unsupported(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str | None:
    """Return why the CPU library cannot take tensors, or None; it takes all dtypes and widths."""
    return None if device.type == "cpu" else f"needs tensors on the CPU, got {device}"


def describe() -> str:
    """Return the code path and threading of the CPU library."""
    openmp = "OpenMP" if CPU.functions.fastpe_openmp() else "one thread, built without OpenMP"
    return f"{ISAS[CPU.functions.fastpe_best_isa()]}, {openmp}"
