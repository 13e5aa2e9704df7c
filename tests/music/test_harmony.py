"""Chords and keys that are estimated from notes (examples/music/harmony.py)."""

import itertools

import numpy as np
import pytest
import songs
from songs import BAR, MELODY, corpus, notes_of

harmony = songs.module("harmony")
POP909 = songs.ROOT.parent / "shared" / "data" / "pop909_dev.npz"

CADENCES = [
    pytest.param([(0, (0, 4, 7)), (9, (9, 0, 4)), (5, (5, 9, 0)), (7, (7, 11, 2))], id="pop"),
    pytest.param([(2, (2, 5, 9, 0)), (7, (7, 11, 2, 5)), (0, (0, 4, 7, 11))], id="jazz"),
    pytest.param([(0, (0, 3, 7)), (2, (2, 5, 8, 0)), (7, (7, 11, 2)), (0, (0, 3, 7))], id="minor"),
]


@pytest.mark.parametrize("shift", range(12))
@pytest.mark.parametrize("beats", [2, 4])
@pytest.mark.parametrize("cadence", CADENCES)
def test_chords_of_progressions(cadence, beats, shift):
    notes, roots, chroma = notes_of(cadence * (4 // beats), shift, beats)
    found = harmony.estimate_chords(notes, len(roots) // 4)
    for estimate, wanted in zip(found, (roots, chroma), strict=True):
        assert np.array_equal(estimate[: len(wanted)], wanted)


def test_chords_pass_over_passing_notes_and_rests():
    notes, roots, chroma = notes_of(CADENCES[0].values[0])
    # runs in the scale above, and a rest on the third beat of every bar
    run = [(MELODY, 2 * i, 2, 72 + (0, 2, 4, 5, 7, 9, 11, 12)[i % 8]) for i in range(32)]
    late = notes + np.array([0, 12, 0, 0])
    late[:, 2] = 4
    notes[:, 2] = 8
    found = harmony.estimate_chords(np.concatenate((notes, late, run)), 4)
    assert np.array_equal(found[0], roots)
    rest = harmony.estimate_chords(np.concatenate((notes, late)), 4)
    assert np.array_equal(rest[0], roots)
    assert np.array_equal(rest[1], chroma)


def test_no_chord_in_bars_of_silence():
    notes, roots, _ = notes_of(CADENCES[0].values[0])
    root, chroma = harmony.estimate_chords(notes + np.array([0, BAR, 0, 0]), 6)
    assert root.tolist() == [-1] * 4 + roots.tolist() + [-1] * 4
    assert np.array_equal(chroma.any(1), root >= 0)


def test_viterbi_is_the_best_path():
    rng = np.random.default_rng(0)
    score, cost = rng.normal(size=(6, 3)), rng.uniform(0, 2, 6)

    def total(path):
        changes = [cost[t] for t in range(1, 6) if path[t] != path[t - 1]]
        return score[np.arange(6), path].sum() - sum(changes)

    best = max(map(list, itertools.product(range(3), repeat=6)), key=total)
    assert harmony._viterbi(score, cost).tolist() == best


@pytest.mark.parametrize("tonic", range(12))
def test_keys_of_progressions(tonic):
    # I IV V I and i iv V i
    major = [(0, (0, 4, 7)), (5, (5, 9, 0)), (7, (7, 11, 2)), (0, (0, 4, 7))]
    minor = [(0, (0, 3, 7)), (5, (5, 8, 0)), (7, (7, 11, 2)), (0, (0, 3, 7))]
    for cadence in (major, minor):
        assert harmony.estimate_key(notes_of(cadence, tonic)[0]) == tonic


def test_chords_and_keys_of_pop909():
    """Four in five roots and tonics agree with the labels; measured: 88 % of each."""
    if not POP909.is_file():
        pytest.skip(f"no {POP909}; not checked: agreement of chords and keys with people's")
    songs = [song for song in corpus.load(POP909) if song.split == "val"]
    roots, tonics = [], []
    for song in songs:
        root, _ = harmony.estimate_chords(song.notes, song.num_bars)
        roots.append((root == song.root)[song.root >= 0].mean())
        tonics.append(harmony.estimate_key(song.notes) == song.tonic)
    assert min(np.mean(roots), np.mean(tonics)) > 0.8
