"""Codec tokens: positions and frames line up to the frame; files that are not what they should."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from songs import module

codec = module("codec")
RATES = (50, 75, Fraction(44100, 512), 12.5, 44100 / 1024)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "step", [Fraction(1, 2), Fraction(5, 6), Fraction(60, 97), Fraction(3, 50)]
)
@pytest.mark.parametrize("make", [Fraction, float], ids=["fractions", "floats"])
def test_the_last_beats_of_an_hour(rate, step, make):
    """Frame i has the label n with n step <= (i + 1/2) / rate < (n + 1) step, in integers."""
    last = math.ceil(3600 / step)
    beats = range(last - 500, last)
    labels = [codec.Label(make(n * step), make((n + 1) * step), n) for n in beats]
    frames = math.ceil(3600 * rate)
    # (2 i + 1) / (2 rate step) = (2 i + 1) a / b
    a, b = (1 / (2 * Fraction(rate) * step)).as_integer_ratio()
    expected = (2 * np.arange(frames) + 1) * a // b
    expected[(expected < beats[0]) | (expected > beats[-1])] = -1
    assert len(set(expected)) > 300
    assert np.array_equal(codec.positions_at_frames(labels, frames, rate), expected)


def test_ties_are_the_later_label():
    # centres at 0.01, 0.03, 0.05 s; in binary floats 0.03 * 50 - 0.5 is above 1
    labels = [codec.Label(0, 0.03, "a"), codec.Label(0.03, 0.05, "b")]
    assert codec.labels_at_frames(labels, 3, 50).tolist() == [0, 1, -1]
    # 5/6 s is the centre of frame 62 at 75 Hz
    labels = [codec.Label(0, 5 / 6, 1), codec.Label(5 / 6, 1, 2)]
    assert codec.labels_at_frames(labels, 75, 75).tolist() == [0] * 62 + [1] * 13


def test_sums_of_floats_do_not_drift():
    """Boundaries that a program has added up are off by rounding, not by a frame."""
    bounds = np.cumsum([0.0] + [0.01] * 20_000).tolist()
    labels = [codec.Label(a, b, 0) for a, b in itertools.pairwise(bounds)]
    found = codec.labels_at_frames(labels, 10_000, 50)
    # the centre of frame i is the start of label 2 i + 1
    assert np.array_equal(found, 2 * np.arange(10_000) + 1)


def test_gaps_order_and_cuts():
    labels = [codec.Label(4, 9, "b"), codec.Label(-2, 1, "a"), codec.Label(2.1, 2.4, "c")]
    assert codec.labels_at_frames(labels, 7, 1).tolist() == [1, -1, -1, -1, 0, 0, 0]
    # "none" is numbered where it first appears
    assert codec.positions_at_frames(labels, 7, 1).tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert codec.labels_at_frames(labels, 0, 1).shape == (0,)
    assert codec.labels_at_frames([], 2, 1).tolist() == [-1, -1]


def test_names_repeat():
    labels = [codec.Label(i, i + 1, name) for i, name in enumerate("ABAC")]
    assert codec.positions_at_frames(labels, 8, 2).tolist() == [0, 0, 1, 1, 0, 0, 2, 2]


def test_numbers_and_vectors():
    labels = [codec.Label(0, 1, 2.5), codec.Label(2, 3, 7)]
    assert codec.positions_at_frames(labels, 3, 1).tolist() == [2.5, -1, 7]
    chroma = np.eye(12)[[0, 7]]
    labels = [codec.Label(0, 1, chroma[0]), codec.Label(2, 3, chroma[1].tolist())]
    found = codec.positions_at_frames(labels, 4, 1)
    assert np.array_equal(found, [chroma[0], np.zeros(12), chroma[1], np.zeros(12)])


def test_bad_labels():
    good = codec.Label(0, 1, "a")
    for labels, message in (
        ([good, codec.Label(0.9, 2, "b")], "labels must not overlap, got label 0 until 1 and"),
        ([codec.Label(1, 1, "a")], "label 0 must end after its start 1, got 1"),
        ([codec.Label(0, math.nan, "a")], "end of label 0 must be a finite number, got nan"),
        ([codec.Label("0", 1, "a")], "start of label 0 must be a finite number, got '0'"),
        ([good, codec.Label(1, 2, 3)], "labels must all be names"),
        ([codec.Label(0, 1, "1"), codec.Label(1, 2, "x"), codec.Label(2, 3, [1])], "must all be"),
        ([codec.Label(0, 1, [1, 2]), codec.Label(1, 2, [1])], "labels must all be names"),
        ([codec.Label(0, 1, math.inf)], "labels must all be names"),
        ([], "labels must have at least one label"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.positions_at_frames(labels, 4, 1)
    for frames in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_frames must be an int of at least 0"):
            codec.labels_at_frames([good], frames, 1)


@pytest.mark.parametrize("rate", [0, -50, math.inf, math.nan, "50", True])
def test_bad_rates(tmp_path, rate):
    np.save(tmp_path / "x.npy", np.zeros((3, 2), dtype=int))
    with pytest.raises(ValueError, match="frame_rate must be"):
        codec.load_tokens(tmp_path / "x.npy", rate)
    with pytest.raises(ValueError, match="frame_rate must be"):
        codec.labels_at_frames([], 3, rate)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8"])
def test_tokens_load(tmp_path, dtype):
    ids = np.arange(12).reshape(6, 2).astype(dtype)
    np.save(tmp_path / "x.npy", ids)
    torch.save(torch.from_numpy(ids), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        tokens = codec.load_tokens(tmp_path / name, 86.1328125)
        assert tokens.ids.dtype == np.int64
        assert np.array_equal(tokens.ids, ids)
        assert tokens.frame_rate == Fraction(44100, 512)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((3, 2)), "must be integers"),
        (np.zeros(3, dtype=int), r"must be integers \[T, num_codebooks\], got int64 \[3\]"),
        (np.zeros((1, 3, 2), dtype=int), "must be integers"),
        (np.zeros((3, 2), dtype=bool), "must be integers"),
        (np.zeros((0, 2), dtype=int), "must not be empty"),
        (np.array([[0, -1]]), "must be 0 to 1048575, got -1"),
        (np.array([[0, 2**40]]), "must be 0 to 1048575, got 1099511627776"),
    ],
)
def test_bad_tokens(tmp_path, ids, message):
    np.save(tmp_path / "x.npy", ids)
    torch.save(torch.from_numpy(ids), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        with pytest.raises(ValueError, match=message):
            codec.load_tokens(tmp_path / name, 50)


def test_bad_files(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([[1, None]], dtype=object))
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 2), dtype=int))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    torch.save({"codes": torch.zeros(2, 2).long()}, tmp_path / "dict.pt")
    torch.save(codec.Tokens(np.zeros((2, 2)), Fraction(1)), tmp_path / "code.pt")
    for name in ("broken.npy", "broken.pt", "tokens.wav"):
        (tmp_path / name).write_bytes(b"no tokens")
    for name in ("empty.npy", "empty.pt"):
        (tmp_path / name).touch()
    for name, message in {
        "none.npy": "does not exist",
        "tokens.wav": "must end in .npy or .pt, got tokens.wav",
        "broken.npy": "is not an .npy file",
        "empty.npy": "is not an .npy file",
        "objects.npy": "is not an .npy file",
        "many.npy": "must hold an array",
        "broken.pt": "is not a .pt file",
        "empty.pt": "is not a .pt file",
        "code.pt": "is not a .pt file",
        "dict.pt": "must hold a tensor, got dict",
    }.items():
        with pytest.raises(ValueError, match=message):
            codec.load_tokens(tmp_path / name, 50)


def test_labels_load(tmp_path):
    path = tmp_path / "labels.json"
    rows = [{"start": 0, "end": 0.03, "label": "C"}, {"start": 0.03, "end": 0.05, "label": "é"}]
    path.write_text(json.dumps(rows))
    labels = codec.load_labels(path)
    assert labels == [codec.Label(0, 0.03, "C"), codec.Label(0.03, 0.05, "é")]
    assert codec.positions_at_frames(labels, 3, 50).tolist() == [0, 1, 2]
    for text in ("", "[1]", '[{"start": 0}]', '{"start": 0}', "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not in the expected format"):
            codec.load_labels(path)
    with pytest.raises(ValueError, match="does not exist"):
        codec.load_labels(tmp_path / "none.json")
