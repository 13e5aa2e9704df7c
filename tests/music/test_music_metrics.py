"""The scores of generated music: tiny rolls by hand, what leaves a score as it is, bad input."""

import numpy as np
import pytest
from songs import ROOT, corpus, module

metrics = module("metrics")
SIMILARITIES = (metrics.chroma_similarity, metrics.grooving_similarity, metrics.f1)
DISTANCES = (metrics.note_density_distance, metrics.ssm_distance)


def _roll(steps, *notes):
    roll = np.zeros((steps, 128), dtype=bool)
    for step, size, pitch in notes:
        roll[step : step + size, pitch] = True
    return roll


def _music(seed=0, bars=3):
    # dense enough that something is struck in every half bar
    return np.random.default_rng(seed).random((16 * bars, 128)) < 0.02


def test_chroma_similarity_by_hand():
    truth = _roll(16, (0, 4, 60), (4, 4, 64), (8, 8, 67))
    # first half: {C} beside {C, E}, cosine 1 / sqrt(2); second: {D} beside {G}
    generated = _roll(16, (0, 8, 60), (9, 2, 62))
    assert metrics.chroma_similarity(generated, truth) == pytest.approx(50 / 2**0.5, rel=1e-12)


def test_chroma_similarity_takes_silence_as_wrong():
    half = _roll(16, (0, 1, 60))
    assert metrics.chroma_similarity(half, half) == pytest.approx(50, rel=1e-12)


def test_grooving_similarity_by_hand():
    # one note on each beat, or two notes on the first and the third
    beats = _roll(16, *((step, 1, 60) for step in (0, 4, 8, 12)))
    halves = _roll(16, *((step, 1, pitch) for step in (0, 8) for pitch in (60, 64)))
    # silence meets in 12 sixteenths; 1/2 and 1/sqrt(2) are in different bins of 20
    assert metrics.grooving_similarity(halves, beats) == 75
    # it does not hear that all is a sixteenth late
    assert metrics.grooving_similarity(np.roll(beats, 1, axis=0), beats) == 100


def test_note_density_distance_by_hand():
    truth = _roll(4, (0, 2, 60), (0, 1, 64))
    assert metrics.note_density_distance(_roll(4, (3, 1, 20)), truth) == (2 + 1 + 0 + 1) / 4


def test_ssm_distance_by_hand():
    # half beats C, C, D and C, D, C: four of nine cosines are 1 instead of 0 or the other way round
    truth, generated = (
        _roll(6, (0, 4, 60), (4, 2, 62)),
        _roll(6, (0, 2, 60), (2, 2, 62), (4, 2, 60)),
    )
    assert metrics.ssm_distance(generated, truth) == pytest.approx(400 / 9, rel=1e-12)
    # {C} beside {C, E}
    truth, generated = _roll(4, (0, 4, 60)), _roll(4, (0, 4, 60), (2, 2, 64))
    expected = 100 * 2 * (1 - 0.5**0.5) / 4
    assert metrics.ssm_distance(generated, truth) == pytest.approx(expected, rel=1e-12)


def test_ssm_distance_in_the_authors_unit():
    """Two of 16 steps a beat are half a sixteenth: on a grid of sixteenths a unit of one step."""
    a, b = _music(0), _music(1)
    fine = metrics.ssm_distance(a.repeat(4, axis=0), b.repeat(4, axis=0), unit=2)
    assert fine == pytest.approx(metrics.ssm_distance(a, b, unit=1), rel=1e-12)


def test_f1_by_hand():
    truth = _roll(4, (0, 4, 60))
    assert metrics.f1(_roll(4, (2, 2, 60), (0, 1, 61)), truth) == pytest.approx(400 / 7, rel=1e-12)
    assert metrics.f1(_roll(4), truth) == 0
    assert metrics.f1(_roll(4), _roll(4)) == 100


@pytest.mark.parametrize("seed", range(3))
def test_identity(seed):
    roll = _music(seed)
    for score in SIMILARITIES:
        assert score(roll, roll.copy()) == pytest.approx(100, rel=1e-12)
    for score in DISTANCES:
        assert score(roll, roll.copy()) == 0


def test_octaves_and_registers():
    a, b = _music(0)[:, :100], _music(1)[:, :100]
    high = np.pad(a, ((0, 0), (24, 4))), np.pad(b, ((0, 0), (12, 16)))
    low = np.pad(a, ((0, 0), (0, 28))), np.pad(b, ((0, 0), (0, 28)))
    # all of one roll by octaves
    for score in (metrics.chroma_similarity, metrics.ssm_distance):
        assert score(*high) == pytest.approx(score(*low), rel=1e-12)
    # both rolls by any interval, or their columns counted from another pitch
    for score in (*SIMILARITIES, *DISTANCES):
        moved = [np.pad(x, ((0, 0), (7, 1))) for x in (a, b)]
        assert score(*moved) == pytest.approx(score(a, b), rel=1e-12)


def test_scores_are_all():
    a, b = _music(0), _music(1)
    expected = {score.__name__: score(a, b) for score in (*SIMILARITIES, *DISTANCES)}
    assert metrics.scores(a, b) == expected
    assert len(expected) == 5


def test_grooving_similarity_is_gameable():
    """An empty roll scores far from 0 on real music, and 0 wherever notes count."""
    path = ROOT.parent / "shared" / "data" / "pop909_dev.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: not checked that silence grooves on POP909")
    songs = [song.cut(0, 16) for song in corpus.load(path) if song.num_bars >= 16]
    found = []
    for song in songs:
        truth = song.roll(corpus.BRIDGE, corpus.ACCOMPANIMENT)
        empty = np.zeros_like(truth)
        found.append(metrics.grooving_similarity(empty, truth))
        assert metrics.f1(empty, truth) == metrics.chroma_similarity(empty, truth) == 0
    assert np.mean(found) > 40


@pytest.mark.parametrize("score", [*SIMILARITIES, *DISTANCES])
def test_bad_rolls(score):
    roll = _music()
    for bad, got in ((roll * 1.0, "float64"), (roll[0], "bool"), (roll.tolist(), "list")):
        with pytest.raises(ValueError, match=rf"generated must be a bool array.* {got}"):
            score(bad, roll)
        with pytest.raises(ValueError, match=rf"truth must be a bool array.* {got}"):
            score(roll, bad)
    with pytest.raises(ValueError, match="generated must have truth's shape"):
        score(roll[:16], roll)
    with pytest.raises(ValueError, match="rolls must have a multiple of"):
        score(roll[:0], roll[:0])


def test_bad_units():
    roll = _music()
    with pytest.raises(
        ValueError, match="rolls must have a multiple of 8 steps and a pitch, got 7"
    ):
        metrics.chroma_similarity(roll[:7], roll[:7])
    with pytest.raises(ValueError, match="unit must be at least 1, got 0"):
        metrics.ssm_distance(roll, roll, unit=0)
