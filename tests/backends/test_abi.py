"""The C ABI: Python mirrors csrc/fastpe.h, and a library of another version is refused in words."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastpe
from fastpe.backends import native
from fastpe.backends.native import library

ROOT = Path(fastpe.__file__).parent.parent
OTHER = "libfastpe_cpu.so is of another version than the Python code of fastpe"
STRUCTS = {
    "FastpeTensor": library.StridedTensor,
    "FastpeCausalDot": library.CausalDot,
    "FastpeSineFeatures": library.SineFeatures,
    "FastpePhiloxNormal": library.PhiloxNormal,
}


def _compiler():
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        pytest.skip("no C++ compiler: not checked against one")
    return command


def _built(directory, source, *flags):
    (directory / "source.cpp").write_text(source)
    out = directory / "out"
    run = [*_compiler(), *flags, "-o", str(out), str(directory / "source.cpp")]
    subprocess.run(run, check=True)
    return out


def test_number_is_of_the_header():
    """Whoever changes csrc/fastpe.h changes the number too, so that older libraries are refused."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not in a clone: the number was not compared with csrc/fastpe.h")
    code = "import setup; print(setup.abi())"
    run = [sys.executable, "-c", code]
    found = int(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert library._ABI[0] == found, (
        f"_ABI in fastpe/backends/native/library.py must be 0x{found:08X}"
    )


def test_structs_are_those_of_the_header(tmp_path):
    """Every field by name, with the place and size that a compiler gives it."""
    lines, expected = [], []
    for name, mirror in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(mirror)}")
        for field, *_ in mirror._fields_:
            where = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {where});')
            at = getattr(mirror, field)
            expected.append(f"{name}.{field} {at.offset} {at.size}")
    header = ROOT / "csrc" / "fastpe.h"
    if not header.exists():
        pytest.skip("not in a clone: structs were not compared with csrc/fastpe.h")
    head = f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\nint main() {{\n'
    program = _built(tmp_path, head + "\n".join(lines) + "\n}\n")
    found = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == expected


def _stub(directory, table):
    """Return a library whose functions do nothing; table: of its ABI, None for none."""
    names = "causal_dot causal_dot_backward sine_features philox_normal step best_isa openmp"
    source = "".join(f"int fastpe_{name}(...) {{ return 0; }}\n" for name in names.split())
    source += 'const char *fastpe_error() { return ""; }\n'
    if table is not None:
        numbers = ", ".join(map(str, table))
        source += f"const long long *fastpe_abi() {{ static const long long x[] = {{{numbers}}};"
        source += " return x; }\n"
    return _built(directory, f'extern "C" {{\n{source}}}\n', "-shared", "-fPIC")


def _changed(i):
    return [x + (i == j) for j, x in enumerate(library._ABI)]


@pytest.mark.parametrize(
    ("table", "fits"),
    [
        pytest.param(library._ABI, True, id="ours"),
        pytest.param(None, False, id="older"),
        pytest.param(_changed(0)[:1], False, id="another-number"),
        *(pytest.param(_changed(i), False, id=f"another-size-{i}") for i in range(1, 5)),
    ],
)
def test_other_versions_are_refused(tmp_path, table, fits):
    path = _stub(tmp_path, table).rename(tmp_path / "libfastpe_cpu.so")
    made = native.Library(path, "fastpe_", ("a compiler", "FASTPE_CPU"), False)
    reason = made.unavailable()
    if fits:
        assert reason is None
        return
    assert reason.startswith(OTHER)
    assert "install fastpe again, in a clone by `FASTPE_CPU=1 pip install -e .`" in reason
    with pytest.raises(ImportError, match=OTHER):
        made.run("causal_dot", library.CausalDot())


def test_libraries_here_are_ours():
    for made in (native.CPU, native.CUDA):
        assert OTHER not in (made.unavailable() or "")


def test_old_library_under_new_code(tmp_path):
    """What `git pull` leaves behind: `auto` warns once and goes on, a named backend raises."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastpe", tmp_path / "fastpe", ignore=ignored)
    _stub(tmp_path, None).rename(tmp_path / "fastpe" / "libfastpe_cpu.so")
    code = """
import warnings, torch, fastpe
x = torch.ones(1, 5, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        o = fastpe.causal_linear_attention(x, x, x)
print(len(caught), bool((o - x).abs().max() < 1e-5), caught[0].message)
try:
    fastpe.causal_linear_attention(x, x, x, backend="cpu")
except RuntimeError as error:
    print(error)
fastpe.show_config()
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warning, error, *config = done.stdout.splitlines()
    assert warning.startswith("1 True fastpe uses its PyTorch reference on cpu, which is slower: ")
    assert error.startswith("backend 'cpu' is not available: ")
    for line in (warning, error, next(line for line in config if line.startswith("  cpu "))):
        assert OTHER in line
        assert "pip install -e ." in line
