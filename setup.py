"""Build csrc/ into torch-free libraries with a C ABI; see CONTRIBUTING.md.

ninja compiles what has changed since the last time, in parallel. Without a compiler the package
installs all the same and runs on PyTorch; FASTPE_CPU=1 turns a failed build into an error. The
CUDA library is built if there is an nvcc: FASTPE_CUDA=1 makes a failure an error too, FASTPE_CUDA=0
leaves the library out.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# cuda/kernels.cu is compiled once for each of these
TYPES = ("float", "double", "BFloat16", "Float16")
# machine code for these, and PTX that runs on every card from 8.0 on
ARCHITECTURES = ("80", "90", "100")
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
# cpu/kernels.cpp is compiled once for each of these; cpu/library.cpp picks one at run time
ISAS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]


def abi() -> int:
    """Return the number of csrc/fastpe.h: another text has another number.

    The libraries are given it; fastpe/backends/native/library.py has it too, and loading compares.
    """
    text = Path("csrc/fastpe.h").read_text(encoding="utf-8")
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def compile_cpu(out: Path, objects: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link the CPU library; with OpenMP if the compiler has it."""
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *extra]
    openmp = ["-fopenmp"]
    try:
        probe = [*compiler, *openmp, "-x", "c++", "-fsyntax-only", "-"]
        subprocess.run(probe, check=True, input=b"#include <omp.h>", stderr=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        openmp = ["-Wno-unknown-pragmas"]
    built = [f"-DFASTPE_HAS_{name.upper()}" for name in ISAS]
    jobs = {"cpu": ("csrc/cpu/library.cpp", [*built, f"-DFASTPE_ABI={abi()}"])}
    for name, flags in ISAS.items():
        jobs[name] = "csrc/cpu/kernels.cpp", [*flags, f"-DFASTPE_ISA={name}"]
    run_ninja([*compiler, *openmp], jobs, out, objects)


def find_nvcc() -> str | None:
    """Return the CUDA compiler: of CUDA_HOME, on the PATH, or where it is installed by default."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    places = [*(f"{home}/bin" for home in homes), None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def compile_cuda(
    out: Path,
    objects: Path,
    extra: tuple[str, ...] = (),
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> str:
    """Compile and link the CUDA library; return what nvcc says, as of registers and spills."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc")
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    # an older compiler leaves newer cards to the PTX
    listing = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True)
    known = listing.stdout.split()
    for n in architectures:
        if f"sm_{n}" in known:
            flags += ["-gencode", f"arch=compute_{n},code=sm_{n}"]
    flags += ["-gencode", "arch=compute_80,code=compute_80"]
    return _compile_by_type([nvcc, *flags, *extra], out, objects)


def compile_cuda_for_host(out: Path, objects: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile the CUDA kernels into loops for the CPU: for tests (csrc/cuda/block.h)."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    _compile_by_type([*compiler, *FLAGS, *extra, "-x", "c++"], out, objects)


def _compile_by_type(compiler: list[str], out: Path, objects: Path) -> str:
    jobs = {"cuda": ("csrc/cuda/library.cpp", [f"-DFASTPE_ABI={abi()}"])}
    for name in TYPES:
        jobs[name] = "csrc/cuda/kernels.cu", [f"-DFASTPE_TYPE={name}"]
    return run_ninja(compiler, jobs, out, objects)


def run_ninja(
    compiler: list[str], jobs: dict[str, tuple[str, list[str]]], out: Path, objects: Path
) -> str:
    """Compile what has changed since the last time, and link it; return what compilers said.

    Args:
        compiler: The command and the flags that all jobs share.
        jobs: By name of the object: its source and its own flags.
        out: The library.
        objects: Folder of the objects, and of what ninja remembers about them.
    """
    from ninja import BIN_DIR, ninja_syntax

    objects.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = objects / f"{out.stem}.ninja"
    # what comes behind -x c++ would be taken for a source, so libraries are linked without it
    linker = compiler[:-2] if compiler[-2:] == ["-x", "c++"] else compiler
    with plan.open("w") as file:
        write = ninja_syntax.Writer(file, width=10**6)
        write.variable("builddir", _escaped(objects))
        command = f"{_command(compiler)} $flags -MD -MF $out.d -c $in -o $out"
        write.rule("compile", command, depfile="$out.d", deps="gcc")
        write.rule("link", f"{_command(linker)} -shared $in -o $out")
        made = []
        for name, (source, flags) in jobs.items():
            made.append(_escaped(objects / f"{name}.o"))
            write.build(made[-1], "compile", source, variables={"flags": _command(flags)})
        write.build(_escaped(out), "link", made)
    ninja = [os.path.join(BIN_DIR, "ninja"), "-f", str(plan)]
    result = subprocess.run(ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.stderr.write(result.stdout)
        result.check_returncode()
    return result.stdout


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escaped(path: Path) -> str:
    # the writer escapes spaces and colons
    return str(path).replace("$", "$$")


# by name of the library: what builds it, the variable that makes a failure an error, what is lost
LIBRARIES = {
    "cpu": (compile_cpu, "FASTPE_CPU", "fastpe will run on PyTorch alone"),
    "cuda": (compile_cuda, "FASTPE_CUDA", "backend 'cuda' will not be available"),
}


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("_")[2]
        compile_it, variable, loss = LIBRARIES[name]
        try:
            # beside the sources, so that the next install compiles what has changed since
            compile_it(Path(self.get_ext_fullpath(ext.name)), Path("build", "objects", name))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            message = f"the {name} library was not built ({error}); {loss}"
            if os.environ.get(variable) == "1":
                sys.exit(message)
            raise CompileError(message) from error

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PurePythonWheel(bdist_wheel):
    """The libraries depend on the platform, not on the version of Python or torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """Return what is to be built here."""
    found = [("cpu", ["csrc/cpu/library.cpp", "csrc/cpu/kernels.cpp"])]
    wanted = os.environ.get("FASTPE_CUDA")
    if find_nvcc() and wanted != "0":
        found.append(("cuda", ["csrc/cuda/library.cpp", "csrc/cuda/kernels.cu"]))
    elif wanted == "1":
        sys.exit("FASTPE_CUDA=1, but there is no nvcc: set CUDA_HOME or the PATH")
    elif wanted != "0":
        print("no nvcc: the CUDA library is left out, the Triton kernels do not need it")
    return [
        Extension(f"fastpe.libfastpe_{name}", sources, depends=HEADERS, optional=True)
        for name, sources in found
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PurePythonWheel},
    )
