"""seq_scaling.py on a machine that is busy: every case has a row, or the run fails and says so."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from songs import example

from fastpe_lab import clocks, records

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")
cases, decode, isolated, measure, report, seq_scaling, variance = map(
    example,
    ("cases", "decode", "timing.isolated", "timing.measure", "report", "seq_scaling", "variance"),
)
SIZES = ["--heads", "2", "--head-dim", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Measure in this process, without pictures."""
    monkeypatch.setattr(seq_scaling, "runner", isolated.InProcess)
    monkeypatch.setattr(report, "plot", lambda records, path: True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def made_up(monkeypatch):
    """Every case is right, and takes a millisecond and a megabyte."""
    measured = {"ms": clocks.spread([1.0] * 3), "sdpa_ms": None, "variant": None}

    def measure_time(name, setup, modes, seconds):
        return dict.fromkeys(modes, measured)

    monkeypatch.setattr(seq_scaling, "check", lambda *args: {"check": {"o": 1e-9}})
    monkeypatch.setattr(seq_scaling, "measure_time", measure_time)
    monkeypatch.setattr(seq_scaling, "measure_memory", lambda *args: {"extra_mb": 1.0})
    # `InProcess` collects garbage after each, which takes longer than all of this
    monkeypatch.setattr(seq_scaling, "runner", lambda device: lambda measure, *args: measure(*args))


@pytest.fixture
def slow_clock(monkeypatch):
    """Let every look at the clock be a minute after the one before."""
    minutes = itertools.count()
    monkeypatch.setattr(seq_scaling.time, "monotonic", lambda: 60.0 * next(minutes))


def _run(out, *options):
    code = seq_scaling.main([*SIZES, *options, "--out", str(out)])
    lines = (out / "seq_scaling.jsonl").read_text().splitlines()
    found = {}
    for record in map(json.loads, lines):
        found[record["case"], record["length"], record["mode"]] = record
    return code, found


QUICK = ["--quick", "--min-len", "64", "--max-len", "256"]


def test_every_case_has_a_row_on_a_slow_machine(slow_clock, made_up, tmp_path, capsys):
    code, found = _run(tmp_path, *QUICK)
    assert code == 0
    names = seq_scaling.chosen(seq_scaling.parse(QUICK))
    assert {"sdpa", *cases.OURS} <= set(names)
    for name, mode in itertools.product(names, measure.MODES):
        first, *others = (found[name, length, mode] for length in (64, 128, 256))
        if cases.CASES[name].slow_start:
            assert first["reason"].startswith("compiles for a minute")
            continue
        assert first["status"] == "ok"
        assert first["ms"]["median"] > 0
        # and none has a second length, as the minutes are over
        assert {r["status"] for r in others} == {"skipped"}
        assert "minutes of --quick are over" in others[0]["reason"]
    out, error = capsys.readouterr()
    assert "error" not in error
    for name in cases.OURS:
        row = next(line for line in out.splitlines() if line.startswith(f"| {name} "))
        assert row.split("|")[2].strip() not in ("", "skipped", "error")


def test_checks_do_not_spend_the_minutes(made_up, monkeypatch, tmp_path):
    """Time passes in checks alone: all lengths are measured."""
    now = [0.0]
    monkeypatch.setattr(seq_scaling.time, "monotonic", lambda: now[0])
    check = seq_scaling.check

    def slow(*args):
        now[0] += 600
        return check(*args)

    monkeypatch.setattr(seq_scaling, "check", slow)
    code, found = _run(tmp_path, *QUICK, "--cases", "fastpe")
    assert code == 0
    assert {key[1] for key, record in found.items() if record["status"] == "ok"} == {64, 128, 256}
    assert {record["status"] for record in found.values()} == {"ok"}


def test_minutes_are_of_measuring(made_up, monkeypatch, tmp_path):
    """One length of one case takes them all: every case has its first, none a second."""
    now = [0.0]
    monkeypatch.setattr(seq_scaling.time, "monotonic", lambda: now[0])
    measure = seq_scaling.measure_time

    def slow(*args):
        now[0] += 600
        return measure(*args)

    monkeypatch.setattr(seq_scaling, "measure_time", slow)
    code, found = _run(tmp_path, *QUICK, "--cases", "fastpe", "fastpe-rope")
    assert code == 0
    measured = {(name, length) for (name, length, _), r in found.items() if r["status"] == "ok"}
    assert measured == {(name, 64) for name in ("sdpa", "fastpe", "fastpe-rope")}


def test_rows_are_measured(slow_clock, tmp_path, monkeypatch):
    """Only memory is made up, of which malloc would have other settings for the tests to come."""
    monkeypatch.setattr(seq_scaling, "measure_memory", lambda *args: {"extra_mb": 1.0})
    code, found = _run(tmp_path, *QUICK, "--cases", "fastpe")
    assert code == 0
    for name, mode in itertools.product(("sdpa", "fastpe"), measure.MODES):
        first, second, _ = (found[name, length, mode] for length in (64, 128, 256))
        assert (first["status"], second["status"]) == ("ok", "skipped")
        assert first["ms"]["repeats"] >= 3
        assert first["ms"]["median"] > 0
        assert first["check"]["dq"] <= clocks.TOLERANCE["float32"][0]


def test_without_quick_there_is_no_end(slow_clock, made_up, tmp_path):
    code, found = _run(tmp_path, "--min-len", "64", "--max-len", "256", "--cases", "fastpe")
    assert code == 0
    assert len(found) == 2 * 3 * len(measure.MODES)
    assert {record["status"] for record in found.values()} == {"ok"}


def test_a_case_without_a_row_is_an_error(made_up, tmp_path, capsys):
    options = ["--min-len", "64", "--max-len", "64", "--cases", "fastpe", "softmax"]
    # less than softmax's matrices of 64 x 64 take
    code, found = _run(tmp_path, "--quick", *options, "--max-memory", "1e-6")
    assert code == 1
    assert found["softmax", 64, "forward"]["status"] == "skipped"
    assert found["fastpe", 64, "forward"]["status"] == "ok"
    error = capsys.readouterr().err
    for mode in measure.MODES:
        assert f"error: no row of softmax, {mode}: predicted" in error
    assert "no row of fastpe" not in error
    assert "nothing was measured" not in error


def test_nothing_measured_is_an_error(made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seq_scaling, "measure_time", lambda *args: {"error": "broken"})
    monkeypatch.setattr(report, "plot", lambda records, path: False)
    code, found = _run(tmp_path, *QUICK, "--cases", "fastpe")
    assert code == 1
    assert {record["status"] for record in found.values()} == {"error", "skipped"}
    out, error = capsys.readouterr()
    for name, mode in itertools.product(("sdpa", "fastpe"), measure.MODES):
        assert f"error: no row of {name}, {mode}: broken" in error
    assert error.rstrip().endswith("error: nothing was measured")
    # there is no picture of nothing
    assert "seq_scaling.png" not in out


@pytest.mark.parametrize("named", [False, True])
def test_cases_that_cannot_run_here(named, made_up, tmp_path, monkeypatch, capsys):
    """They are left out with their reason, and an error only where they were asked for by name."""
    absent = replace(cases.CASES["fastpe-rope"], unavailable=lambda setup: "no such thing here")
    few = {name: cases.CASES[name] for name in ("sdpa", "fastpe")} | {"absent": absent}
    monkeypatch.setattr(cases, "CASES", few)
    options = ["--quick", "--min-len", "64", "--max-len", "64"]
    code, found = _run(tmp_path, *options, *(["--cases", "fastpe", "absent"] if named else []))
    assert found["absent", 64, "forward"]["reason"] == "no such thing here"
    assert code == named
    error = capsys.readouterr().err
    assert ("error: no row of absent, forward: no such thing here" in error) == named


def test_a_row_of_decoding_without_kernels_is_an_error(monkeypatch):
    """Times of PyTorch and of softmax alone are no row."""
    reasons = {"cpu": None, "reference": None, "cuda": "not built", "triton": "not installed"}
    monkeypatch.setattr(decode.fastpe, "available_backends", lambda: reasons)
    setup = records.Setup(80, device="cuda")
    with pytest.raises(RuntimeError, match=r"no kernels run on cuda: .*not built"):
        decode.backends(setup)
    reasons["triton"] = None
    assert decode.backends(setup) == {"fastpe triton": "triton"}


def test_errors_that_are_no_numbers_fail(monkeypatch, tmp_path, capsys):
    found = dict.fromkeys(variance.MEASURES, 0.5)
    records = [{"row": "one stage", "features": 64} | found]
    monkeypatch.setattr(variance, "measure", lambda args, backend: records)
    monkeypatch.setattr("sys.argv", ["variance.py", "--threads", "1", "--out", str(tmp_path)])
    assert variance.main() == 0
    records[0]["rms"] = float("nan")
    assert variance.main() == 1
    assert "error: one stage, R = 64: not finite" in capsys.readouterr().err
