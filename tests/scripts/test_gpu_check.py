"""scripts/gpu_check.sh without a GPU: every step starts and finds its work, and fits its call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def _run(*arguments, out=None, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    if out:
        env["OUT"] = str(out)
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True)


def _plan():
    """Return [(call, step, seconds)]."""
    rows = _run("--plan").stdout.split("\n")
    return [(call, step, int(s)) for call, step, s, *_ in map(str.split, filter(None, rows))]


PLAN = _plan()
# steps that run tests; what the others write
TESTS = {"triton", "cuda", "again", "sanitize", "large", "host"}
RECORDS = {
    "smoke": "smoke.jsonl",
    "smoke_cuda": "smoke.jsonl",
    "scan": "bars.jsonl",
    "tiles": "tiles.jsonl",
    "crossover": "bars.jsonl",
    "decode": "decode.jsonl",
    "scaling": "seq_scaling.jsonl",
}


def test_it_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("call", ["first", "second"])
def test_a_call_fits_its_time(call):
    """330 seconds, some of which pass before the first step and while the last one is stopped."""
    seconds = [s for of, _, s in PLAN if of == call]
    assert len(seconds) >= 7
    assert sum(seconds) <= 315


@pytest.mark.parametrize("step", [step for _, step, _ in PLAN])
def test_a_step_starts_and_finds_its_work(step, tmp_path):
    """Its command runs to its end; it collects tests, or writes records."""
    done = _run("--dry", step, out=tmp_path)
    log = (tmp_path / "gpu_check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
    assert not done.stderr
    files = [path.name for path in tmp_path.iterdir()]
    assert len(files) <= 8
    if step in TESTS:
        rows = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
        assert rows
        assert all(row["outcome"] in ("skipped", "passed") for row in rows)
        # six cases, each under two tools
        assert step != "sanitize" or len(rows) == 12
        assert step != "large" or len(rows) == 2
    elif step in RECORDS:
        assert (tmp_path / RECORDS[step]).read_text().count("\n") >= 2


@pytest.mark.parametrize(
    ("options", "said", "reason"),
    [
        ("--deselect=tests/gpu/test_gpu_runtime.py", "failed: no test was found", "deselected in"),
        ("--no-such-option", "failed, status 4", "unrecognized arguments: --no-such-option"),
    ],
)
def test_a_step_that_does_nothing_fails(options, said, reason, tmp_path):
    done = _run("--dry", "host", out=tmp_path, PYTEST_ADDOPTS=options)
    assert done.returncode == 1
    assert said in done.stdout
    assert reason in (tmp_path / "gpu_check.log").read_text()


def test_no_time_is_a_failure(tmp_path):
    done = _run("--dry", "-x", "0", "machine", out=tmp_path)
    assert done.returncode == 1
    assert "stopped: its time was over" in done.stdout


def test_names_of_steps():
    done = _run("--dry", "third")
    assert done.returncode == 2
    assert "no step third: first, second, or one of machine smoke" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path):
    done = _run("first", out=tmp_path)
    assert done.returncode == 1
    assert "--dry runs without one" in done.stderr
