"""benchmarks/tiles.py in Triton's interpreter: a tile reaches its kernel, and must be right."""

import importlib.util
import itertools
import os
import time

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import smoke
import tiles
from tiles import Group, Tile
from timing.isolated import Isolated

from fastpe_lab.records import Setup

SETUP = Setup(48, batch=1, heads=1, dtype="float32", backend="triton")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)


def _launched(group, tile, monkeypatch):
    """Return the constants of each kernel that a role's call launches with a tile."""
    found = {}
    kernel = tiles.causal_dot_launch.Kernel
    call = kernel.__call__

    def record(self, *args):
        found[self.function.fn.__name__] = self.meta
        call(self, *args)

    run = tiles.prepare(group, SETUP)
    with monkeypatch.context() as m, tiles.override(group, tile), torch.no_grad():
        m.setattr(kernel, "__call__", record)
        run()
    return found


@interpreted
def test_a_tile_reaches_its_kernel_alone(monkeypatch):
    before = tiles.causal_dot_launch.blocks, tiles.causal_dot_launch.segments
    group, names = Group("forward", "none", 32), ("C", "BW", "BE", "num_warps", "num_stages")
    found = _launched(group, Tile(32, 16, 2, 3, 2), monkeypatch)
    assert [found["forward_kernel"][name] for name in names] == [32, 32, 16, 2, 3]
    # another role's is as it was; that it runs at all is due to the two segments
    default = _launched(group, Tile(segments=2), monkeypatch)["state_kernel"]
    assert all(found["state_kernel"][name] == default[name] for name in names)
    assert "state_kernel" not in _launched(group, Tile(segments=1), monkeypatch)
    assert (tiles.causal_dot_launch.blocks, tiles.causal_dot_launch.segments) == before
    # columns of the result, of which pairs have two
    found = _launched(Group("grad_q", "rope", 64), Tile(columns=32), monkeypatch)
    assert found["grad_q_kernel"]["BW"] == 16


@interpreted
@pytest.mark.parametrize(
    ("role", "encoding"),
    [("forward", "rope"), ("state", "none"), ("grad_q", "none"), ("grad_kv", "none")],
)
def test_other_tiles_are_right(role, encoding):
    found = tiles.compare(Group(role, encoding, 16), Tile(32, 16, 4, 3, 2), SETUP)
    assert found.keys() == {"check"}, found
    # another order of sums, not the same one again: the tile was taken
    assert 0 < found["check"] < 1e-5


@interpreted
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda o, calls: o.mul_(1.5), "wrong against the default tile"),
        (lambda o, calls: o[:, 40:].fill_(torch.nan), "wrong against the default tile"),
        (lambda o, calls: o.add_(1e-6 * next(calls)), "two runs give different bits"),
    ],
)
def test_wrong_tiles_are_refused(spoil, said, monkeypatch):
    plain, run, calls = tiles.causal_dot_launch.blocks, tiles.backend.causal_dot, itertools.count()

    def wrong(*args, **options):
        results = run(*args, **options)
        if tiles.causal_dot_launch.blocks is not plain:
            spoil(results[0], calls)
        return results

    monkeypatch.setattr(tiles.backend, "causal_dot", wrong)
    found = tiles.compare(Group("forward", "none", 16), Tile(c=16), SETUP)
    assert said in found["error"]


def test_what_a_kernel_leaves_unwritten_shows(monkeypatch):
    """New memory does not hold the right results of the run before, but NaN."""
    plain, full_like, memory = tiles.causal_dot_launch.blocks, torch.full_like, [torch.ones(8)]

    def freed(x, value):
        memory.append(full_like(x, value))
        return memory[-1]

    # a kernel that writes nothing returns what was in the memory
    run = lambda: [memory[0] if tiles.causal_dot_launch.blocks is plain else memory[-1]]  # noqa: E731
    monkeypatch.setattr(torch, "full_like", freed)
    monkeypatch.setattr(tiles, "prepare", lambda group, setup: run)
    found = tiles.compare(Group("forward", "none", 16), Tile(c=16), SETUP)
    assert "wrong against the default tile" in found["error"]


def test_every_role_has_candidates():
    args = tiles.parse(["--device", "cpu", "--out", "nowhere"])
    groups = tiles.groups(args)
    assert {g.role for g in groups} == set(tiles.ROLES)
    assert set(tiles.PREDICTED) <= set(groups)
    for group in groups:
        found = tiles.candidates(group)
        assert len(set(found)) == len(found) >= 12
        assert Tile() not in found
        predicted = tiles.PREDICTED.get(group, [])
        assert found[: len(predicted)] == predicted
    # one kernel makes both gradients where the whole state fits a program
    assert {g.head_dim for g in groups if g.role == "grad_kv"} == {64}
    assert {g.head_dim for g in groups if g.role in ("grad_k", "grad_v")} == {128}


def test_a_process_that_dies_or_hangs_is_an_error():
    assert "ended with code -6" in Isolated()(os.abort)["error"]
    assert Isolated(0.5)(time.sleep, 60) == {"error": "not done after 0.5 s"}


def test_smoke_says_what_failed(monkeypatch, tmp_path, capsys):
    def measure(isolated, name, setup):
        row = {"case": name, "backend": setup.backend, "dtype": setup.dtype, "seconds": 0.0}
        return row | ({"error": "crashed"} if name == "fastpe-rope" else {"check": {"o": 1e-7}})

    monkeypatch.setattr(smoke, "measure", measure)
    options = ["--device", "cpu", "--backends", "cpu", "--out", str(tmp_path)]
    assert smoke.main(options) == 1
    said = capsys.readouterr().out
    assert said.count("crashed") == 2
    assert "6 of 8 cases are right" in said
    assert len((tmp_path / "smoke.jsonl").read_text().splitlines()) == 8
