"""Build csrc/ into torch-free libraries with a C ABI; see CONTRIBUTING.md.

Without a compiler the package installs all the same and runs on PyTorch; FASTPE_CPU=1 turns a
failed build into an error.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# cpu_kernels.cpp is compiled once for each of these; cpu.cpp picks one at run time
ISAS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]


def compile_cpu(out: Path, objects: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link the CPU library; with OpenMP if the compiler has it."""
    compiler = shlex.split(os.environ.get("CXX", "c++")) + FLAGS + list(extra)
    objects.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)

    def run(*args: str, **options: object) -> None:
        subprocess.run([*compiler, *args], check=True, **options)

    openmp = ["-fopenmp"]
    try:
        probe = {"input": b"#include <omp.h>", "stderr": subprocess.DEVNULL}
        run(*openmp, "-x", "c++", "-fsyntax-only", "-", **probe)
    except subprocess.CalledProcessError:
        openmp = ["-Wno-unknown-pragmas"]
    built = [f"-DFASTPE_HAS_{name.upper()}" for name in ISAS]
    jobs = [(objects / "cpu.o", [*built, "csrc/cpu.cpp"])]
    for name, flags in ISAS.items():
        source = [f"-DFASTPE_ISA={name}", "csrc/cpu_kernels.cpp"]
        jobs.append((objects / f"{name}.o", [*flags, *source]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: run("-c", *openmp, *job[1], "-o", str(job[0])), jobs))
    run("-shared", *openmp, *(str(job[0]) for job in jobs), "-o", str(out))


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            compile_cpu(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "cpu")
        except (OSError, subprocess.CalledProcessError) as error:
            message = f"the CPU library was not built ({error}); fastpe will run on PyTorch alone"
            if os.environ.get("FASTPE_CPU") == "1":
                sys.exit(message)
            raise CompileError(message) from error

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PurePythonWheel(bdist_wheel):
    """The libraries depend on the platform, not on the version of Python or torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "fastpe.libfastpe_cpu",
                ["csrc/cpu.cpp", "csrc/cpu_kernels.cpp"],
                depends=HEADERS,
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PurePythonWheel},
    )
