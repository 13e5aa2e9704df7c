"""A worker whose GPU context is lost is replaced, and reports are on disk as they come."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import watch

SUPPORT = str(Path(__file__).parents[1] / "support")

# a context that a test loses stays lost in its process
CONFTEST = f"""
import sys
sys.path.insert(0, {SUPPORT!r})
import watch

LOST = []
watch.context_is_lost = lambda: bool(LOST)


def pytest_addoption(parser):
    parser.addoption("--record", action="append", default=[])


def pytest_configure(config):
    config.pluginmanager.register(watch.Watch(config))
"""

INNER = """
import pytest
from conftest import LOST


@pytest.mark.parametrize("i", range(9))
def test_kernel(i):
    assert not LOST, "the context of this process is lost"
    if i in (2, 5):
        LOST.append(i)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.fixture
def run(tmp_path):
    """Run INNER in a process of its own; return its status, its output and the records."""

    def run(*options):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_inner.py").write_text(INNER)
        files = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        command += [x for file in files for x in ("--record", str(file))]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        first, second = (file.read_text() for file in files)
        assert first == second
        return done.returncode, done.stdout, [json.loads(line) for line in first.splitlines()]

    return run


def _outcomes(records, outcome):
    return {r["test"].partition("[")[2][0] for r in records if r["outcome"] == outcome}


def test_a_lost_worker_is_replaced(run):
    pytest.importorskip("xdist")
    status, output, records = run("-p", "xdist.plugin", "-n", "2", "--dist", "load")
    assert status == 1, output
    assert output.count("replacing crashed worker") == 2, output
    assert _outcomes(records, "passed") == set("0134678"), output
    assert _outcomes(records, "failed") == set("25")
    # the failure itself arrives, not only that a worker has gone
    texts = [r["text"] for r in records if r["outcome"] == "failed" and r["when"] == "call"]
    assert len(texts) == 2
    assert all("illegal memory access" in text for text in texts)


def test_without_workers_it_ends(run):
    status, output, records = run()
    assert status == 1, output
    assert "the GPU's context is lost" in output
    assert _outcomes(records, "passed") == set("01")
    assert _outcomes(records, "failed") == set("2")


def test_the_card_says_whether_it_is_lost(monkeypatch):
    assert not watch.context_is_lost()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert not watch.context_is_lost()

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", fail)
    assert watch.context_is_lost()
