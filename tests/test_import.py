"""Importing fastpe: its cost, what it needs, what it says."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpe

PACKAGE = Path(fastpe.__file__).parent


def _python(code, **options):
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_little():
    """Less than 0.3 s beyond torch, the best of several processes."""
    code = (
        "import time, torch; start = time.perf_counter(); import fastpe; "
        "print(time.perf_counter() - start)"
    )
    path = {"cwd": PACKAGE.parent}
    times = []
    for _ in range(5):
        times.append(float(_python(code, **path)))
        if times[-1] < 0.3:
            return
    pytest.fail(f"import fastpe took {min(times):.2f} s beyond torch")


def test_a_folder_named_fastpe_does_not_hide_it(tmp_path):
    """As the clone does in the folder it was cloned into."""
    (tmp_path / "fastpe").mkdir()
    assert _python("import fastpe; print(fastpe.RoPE(8))", cwd=tmp_path).startswith("RoPE")


def test_import_starts_nothing():
    """No library is loaded, no compiler or triton is looked for, and nothing is printed."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastpe\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'setuptools', 'subprocess', 'numpy', 'scipy'}, new\n"
        # it imports triton, where that is installed
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "import os\n"
        "if os.path.exists('/proc/self/maps'):\n"
        "    assert 'libfastpe' not in open('/proc/self/maps').read()\n"
    )
    assert _python(code, cwd=PACKAGE.parent) == ""


@pytest.fixture
def without_library(tmp_path):
    """A copy of the package as it is where nothing could be compiled."""
    shutil.copytree(
        PACKAGE, tmp_path / "fastpe", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return {"cwd": tmp_path, "env": {"PATH": "", "PYTHONPATH": str(tmp_path), "HOME": "/"}}


def test_works_without_compiler_library_or_triton(without_library):
    code = """
import os, sys, warnings
sys.modules["triton"] = None
import torch, fastpe
assert fastpe.__file__.startswith(os.environ["PYTHONPATH"]), fastpe.__file__
x = torch.randn(1, 5, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        o = fastpe.causal_linear_attention(x, x, x, pos_encoding=fastpe.SineSPE(8, 2))
        fastpe.nn.CausalLinearAttention(16, 2, pos_encoding=fastpe.RoPE(8))(x.flatten(2))
print(len(caught), caught[0].category.__name__, caught[0].filename == "<string>")
print(caught[0].message)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    fastpe.causal_linear_attention(x, x, x, backend="reference")
try:
    fastpe.causal_linear_attention(x, x, x, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    count, warning, error = _python(code, **without_library).splitlines()
    assert count == "1 RuntimeWarning True", "one warning, and it points at the caller"
    for message in (warning, error):
        assert "libfastpe_cpu.so was not built: install a C++ compiler" in message


def test_broken_library(without_library):
    """A file that is no library counts as missing, and its error is passed on."""
    library = without_library["cwd"] / "fastpe" / "libfastpe_cpu.so"
    library.write_bytes(b"not a library")
    out = _python("import fastpe; print(fastpe.available_backends())", **without_library)
    assert "libfastpe_cpu.so does not load: " in out
    assert "'reference': None" in out


def test_show_config_without_library(without_library):
    out = _python("import fastpe; fastpe.show_config()", **without_library)
    assert "cpu        unavailable: libfastpe_cpu.so was not built" in out
    assert "reference  plain PyTorch" in out
    assert "auto       'reference' for tensors on the CPU" in out


def test_show_config(capsys):
    if fastpe.available_backends()["cpu"] is not None:
        pytest.skip("backend 'cpu' is not available: its line was not checked")
    fastpe.show_config()
    out = capsys.readouterr().out
    assert f"fastpe {fastpe.__version__}, torch {torch.__version__}" in out
    assert platform.python_version() in out
    assert f"{torch.get_num_threads()} threads" in out
    assert "OpenMP" in out
    assert "reference  plain PyTorch" in out
    assert "auto       'cpu' for tensors on the CPU" in out


def test_available_backends():
    found = fastpe.available_backends()
    assert list(found) == ["cpu", "triton", "cuda", "reference"]
    assert found["reference"] is None
    assert found["cpu"] is None or "libfastpe_cpu.so" in found["cpu"]


def test_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert sorted(fastpe.__all__, key=str.casefold) == sorted(set(fastpe.__all__), key=str.casefold)
    for name in fastpe.__all__:
        assert getattr(fastpe, name) is not None
