"""What scripts/gpu_cache.py says of a cache that came along."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def gpu_cache(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("gpu_cache")
    sys.modules.pop("gpu_cache")


def _compile(folder, name, when):
    (folder / name).mkdir()
    code = folder / name / "some_kernel.cubin"
    code.write_bytes(b"code")
    os.utime(code, (when, when))


def test_report(gpu_cache, tmp_path):
    """How many came along, how many were compiled since, and what the entries depend on."""
    _compile(tmp_path, "A", 1000)
    assert "none came along, 1 kernels compiled here" in gpu_cache.report(tmp_path)
    gpu_cache.stamp(tmp_path)
    mark = tmp_path / "made_with.json"
    os.utime(mark, (2000, 2000))
    _compile(tmp_path, "B", 3000)
    said = gpu_cache.report(tmp_path)
    assert said.startswith("cache: 1 kernels came along, 1 compiled here; made with the same")
    made = json.loads(mark.read_text())
    mark.write_text(json.dumps(made | {"libtriton": "another"}))
    os.utime(mark, (2000, 2000))
    said = gpu_cache.report(tmp_path)
    assert f"; libtriton another there, {made['libtriton']} here" in said
    assert "kernels" not in said.partition("; ")[2]


def test_other_kernels_are_other_entries(gpu_cache, monkeypatch, tmp_path):
    """A line of any kernel changes what the entries depend on."""
    before = gpu_cache.made_with()["kernels"]
    for file in gpu_cache.KERNELS.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(gpu_cache, "KERNELS", tmp_path)
    assert gpu_cache.made_with()["kernels"] == before
    with (tmp_path / "scan.py").open("a") as file:
        file.write("# another line\n")
    assert gpu_cache.made_with()["kernels"] != before
