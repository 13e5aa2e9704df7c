"""seq_scaling.py --baselines: rows, their gate, and where they fill a memory."""

import cases
import pytest
import report
import seq_scaling
import torch
from cases import LITERATURE
from timing import measure
from timing.isolated import InProcess

from fastpe_lab.records import Setup


def _chosen(*options):
    return seq_scaling.chosen(seq_scaling.parse([*options, "--out", "nowhere"]))


def test_rows_are_asked_for():
    plain = _chosen()
    assert not set(plain) & set(LITERATURE)
    assert plain[0] == "sdpa"
    everything = _chosen("--baselines", "all")
    assert everything[: len(plain)] == plain
    assert everything[len(plain) :] == list(LITERATURE)
    some = _chosen("--baselines", "softmax", "fnet", "shaw", "--cases", "fastpe")
    assert some == ["sdpa", "fastpe", "shaw", "fnet"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--baselines", "performr"], "--baselines must be of all, softmax, shaw"),
        (["--cases", "shaw"], "--cases must be of sdpa, softmax"),
    ],
)
def test_unknown_rows(options, said, capsys):
    with pytest.raises(SystemExit):
        seq_scaling.parse(options)
    error = capsys.readouterr().err
    assert said in error
    assert error.rstrip().endswith(f"got {options[1]}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LITERATURE)
def test_gate(name, dtype):
    """Outputs and gradients agree with float64, in every dtype; and the gate can fail."""
    threads = torch.get_num_threads()
    setup = Setup(70, heads=2, head_dim=8, dtype=dtype, threads=threads)
    result = measure.check(name, setup)
    assert "error" not in result
    assert result["check"]["o"] > 0
    if list(cases.CASES[name].build(setup, None).parameters):
        assert "dparameters" in result["check"]


def test_gate_sees_a_wrong_parameter(monkeypatch):
    def wrong(setup, variant):
        model = LITERATURE["compressive-conv"].build(setup, variant)
        model.parameters[0].data.mul_(1.1)
        return model

    monkeypatch.setitem(cases.CASES, "wrong", cases.Case("wrong", wrong))
    setup = Setup(130, heads=2, head_dim=8, threads=torch.get_num_threads())
    assert "wrong against float64" in measure.check("wrong", setup)["error"]


@pytest.mark.parametrize(("a", "b"), [(0.0, 3e-6), (2e-2, 1e-5), (-1e-3, 1e-5)])
def test_reach_of_quadratic_memory(a, b):
    def memory(t):
        return a * t + b * t * t

    points = [(t, memory(t)) for t in (512, 4096, 1024, 2048)]
    end = report.longest(points, 16e3, quadratic=True)
    assert abs(memory(end) - 16e3) < 1e-6
    # measured lengths are forgotten but for the two longest
    points[0] = (512, 1e9)
    assert report.longest(points, 16e3, quadratic=True) == end


def test_reach_of_linear_memory():
    points = [(t, 7.0 + 0.01 * t) for t in (256, 512, 1024)]
    assert report.longest(points, 16e3, quadratic=False) == pytest.approx(1599300, rel=1e-9)


def test_reach_of_one_length_and_of_none():
    assert report.longest([(1000, 10.0)], 40.0, quadratic=True) == pytest.approx(2000)
    assert report.longest([(1000, 10.0)], 40.0, quadratic=False) == pytest.approx(4000)
    for quadratic in (False, True):
        assert report.longest([(512, 9.0), (1024, 9.0)], 40.0, quadratic) is None


def _record(name, length, megabytes, mode=measure.TRAINING, **more):
    times = {"ms": {"median": 1.0}, "sdpa_ms": None}
    machine = dict.fromkeys(("cpu", "threads", "torch", "fastpe", "commit", "backend", "python"))
    sizes = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32", "date": "2026-01-01"}
    row = {"case": name, "length": length, "extra_mb": megabytes, "mode": mode, "status": "ok"}
    row |= {"label": name, "ours": False, "device": "cpu", "causal": True}
    row |= {"quadratic_memory": False}
    return row | times | machine | sizes | more


def test_table_of_reach():
    square = {"quadratic_memory": True}
    records = [_record("shaw", t, 1e-3 * t * t, **square) for t in (512, 1024)]
    records += [_record("shaw", t, 1.0, measure.FORWARD, **square) for t in (512, 1024)]
    records += [_record("shaw", 2048, 0.0, status="skipped", reason="too large", **square)]
    records += [_record("fnet", t, 0.5 * t, causal=False) for t in (512, 1024)]
    records += [_record("tiny", t, 0.1) for t in (512, 1024)]
    old = _record("older", 512, 9.0)
    del old["quadratic_memory"]
    records.append(old)
    head, *rows = report.reach(records)
    assert head[-1] == "16 GB at T = (extrapolated)"
    assert rows == [
        ["shaw", "1024", "1049", "T^2", "4,000"],
        ["fnet", "1024", "512", "T", "32,000"],
    ]
    text = report.tables(records)
    assert "| fnet (bidirectional) |" in text
    assert "shaw (bidirectional)" not in text
    assert "16 GB at T = (extrapolated)" in text


def test_limits_know_how_memory_grows():
    setup = Setup(4096)
    limits = seq_scaling.Limits(1.0, 30.0, 1.0, False, None)
    sweep = seq_scaling.Sweep(setup, limits, InProcess("cpu"))
    for name, said in (("shaw", "predicted 1.6 GB"), ("reformer", None), ("sdpa", None)):
        sweep.last[name, measure.TRAINING] = 1024, 1.0, 100.0
        found = sweep._too_much(name, setup, measure.TRAINING)
        assert (found or "None").startswith(str(said))
    assert sweep._too_much("fnet", setup, measure.TRAINING) is None
