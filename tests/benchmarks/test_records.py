"""Benchmarks write what they have measured at once: one that is stopped leaves its records."""

import json

import bars
import decode
import pytest
from timing import turns

MS = {"median": 1.0, "q1": 1.0, "q3": 1.0, "repeats": 3}
SIZE = ["--batch", "1", "--heads", "1", "--head-dim", "16", "--threads", "1", "--device", "cpu"]
SIZE += ["--dtype", "float32"]


class Stopped(BaseException):
    """As when somebody presses Ctrl-C."""


def _stop_at(calls, result):
    """Return a function that returns a result, and raises at its last call."""
    left = iter([result] * (calls - 1))

    def run(*args, **options):
        for found in left:
            return found
        raise Stopped

    return run


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bars(tmp_path, monkeypatch):
    sizes = ["--widths", "16", "16", "32", "--bar-lengths", "16", "24", "--gate", "16"]
    options = [*SIZE, *sizes, "--copy", "0.0001", "--parts", "scan", "--out", str(tmp_path)]
    monkeypatch.setattr(turns, "check", _stop_at(3, {"check": {"o": 0.0}}))
    with pytest.raises(Stopped):
        bars.main(options)
    kinds = [row["kind"] for row in _rows(tmp_path / "bars.jsonl")]
    assert kinds == ["copy", "check", "check"]


def test_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "runner", lambda device: _stop_at(3, {"fastpe": MS}))
    with pytest.raises(Stopped):
        decode.main([*SIZE, "--contexts", "16", "32", "--out", str(tmp_path)])
    rows = _rows(tmp_path / "decode.jsonl")
    assert [row["context"] for row in rows] == [16, 32]


def test_parts_of_bars():
    args = bars.parse([*SIZE, "--out", "nowhere"])
    assert args.parts == list(bars.PARTS) == ["scan", "spe", "cliff", "crossover"]
    assert bars.parse([*SIZE, "--parts", "spe", "cliff", "--out", "x"]).parts == ["spe", "cliff"]
