"""Pictures of music: names of chords, and rolls that are drawn where they sound."""

from dataclasses import replace

import numpy as np
import pytest
from songs import corpus, module

image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
chords = module("chords")
pictures = module("pictures")
metrics = module("metrics")


def _song(bars, root=0, phrase=97):
    beats = 4 * bars
    chroma = np.zeros((beats, 12), dtype=bool)
    chroma[:, [0, 4, 7]] = root >= 0
    notes = np.array([[corpus.MELODY, 4 * i, 3, 60 + i % 12] for i in range(beats)])
    return corpus.Song(
        "scales", notes, bars, np.full(beats, root), chroma, np.full(bars, phrase), 0
    )


@pytest.mark.parametrize(
    ("root", "pitches", "name"),
    [
        (0, (0, 4, 7), "C"),
        (9, (9, 0, 4), "Am"),
        (7, (7, 11, 2, 5), "G7"),
        (10, (10, 2, 5, 9), "Bbmaj7"),
        (11, (11, 2, 5, 9), "Bm7b5"),
        (6, (6, 9, 0, 3), "F#dim7"),
        (2, (2, 7, 9), "Dsus4"),
        (0, (2, 5, 9, 0), "Dm7/C"),
        (0, (8, 0, 3), "Ab/C"),
        # the bass is no tone of the chord
        (0, (7, 11, 2, 5), "G7/C"),
        (0, (0, 4, 7, 1, 6), "C*"),
        (0, (), "C*"),
        (-1, (), "N.C."),
    ],
)
def test_chord_names(root, pitches, name):
    chroma = np.zeros(12, dtype=bool)
    chroma[list(pitches)] = True
    assert chords.chord_name(root, chroma) == name
    # at every pitch it is the same kind
    kinds = {
        chords.chord_name((root + i) % 12, np.roll(chroma, i)).split("/")[0].lstrip("ABCDEFGb#")
        for i in range(12 if root >= 0 else 0)
    }
    assert len(kinds) == (root >= 0)


def test_bad_chords():
    with pytest.raises(ValueError, match=r"chroma must be \[12\], got \[11\]"):
        chords.chord_name(0, np.zeros(11))
    with pytest.raises(ValueError, match="root must be -1 to 11, got 12"):
        chords.chord_name(12, np.zeros(12))


def test_runs():
    assert list(corpus.runs(np.array([3, 3, 1, 3]))) == [(0, 2), (2, 3), (3, 4)]
    assert list(corpus.runs(np.array([[0, 1], [0, 1], [1, 1]]))) == [(0, 2), (2, 3)]


@pytest.mark.parametrize("bars", [1, 16, 17])
def test_picture_sizes(tmp_path, bars):
    """A system more is as high again; a bar more is as wide again, up to 16."""
    song = _song(bars)
    path = tmp_path / "rolls.png"
    pictures.piano_rolls(song, {"melody": song.roll()}, path)
    height, width, _ = image.imread(path).shape
    system = 2 * (0.22 + 0.06) + 0.75 + 0.06 + 0.45
    inside = {1: 4.0, 16: 16 * 0.85, 17: 9 * 0.85}[bars]
    assert abs(height - 110 * (0.45 + system * (1 if bars < 17 else 2))) <= 1
    assert abs(width - 110 * (1.3 + 0.15 + inside)) <= 1


def test_lanes_without_labels_are_left_out(tmp_path):
    heights = []
    for i, options in enumerate(({}, {"root": -1}, {"root": -1, "phrase": -1})):
        song = _song(2, **options)
        pictures.piano_rolls(song, {"melody": song.roll()}, tmp_path / f"{i}.png")
        heights.append(image.imread(tmp_path / f"{i}.png").shape[0])
    assert heights[0] > heights[1] > heights[2]


def test_notes_are_where_they_sound(tmp_path):
    """A note of one picture and not of the other differs in its place alone."""
    song = _song(4, phrase=-1)
    roll = song.roll()
    more = roll.copy()
    more[32:48, 66] = True
    shown = []
    for i, x in enumerate((roll, more)):
        pictures.piano_rolls(song, {"melody": x}, tmp_path / f"{i}.png")
        shown.append(image.imread(tmp_path / f"{i}.png"))
    rows, columns, _ = np.nonzero(shown[0] != shown[1])
    # the third of four bars, which are as wide as the picture but for 1.3 and 0.15 inches
    left, width = 1.3 * 110, 4 * 110
    assert left + width / 2 - 2 <= columns.min()
    assert columns.max() <= left + width * 3 / 4 + 2
    assert columns.max() - columns.min() > 0.8 * width / 4
    assert rows.max() - rows.min() < 10


def test_empty_rolls_and_a_title(tmp_path):
    song = replace(_song(3), notes=np.zeros((0, 4), dtype=int))
    rolls = {"nothing": song.roll(), "everything": np.ones((48, 128), dtype=bool)}
    pictures.piano_rolls(song, rolls, tmp_path / "empty.png", "Nothing")
    assert (image.imread(tmp_path / "empty.png")[..., :3].std((0, 1)) > 0).all()
    assert not metrics.onsets(rolls["nothing"]).any()


def test_bad_rolls(tmp_path):
    song = _song(2)
    with pytest.raises(ValueError, match="rolls must have at least one roll, got none"):
        pictures.piano_rolls(song, {}, tmp_path / "x.png")
    for roll in (song.roll()[:-1], song.roll() * 1.0):
        with pytest.raises(ValueError, match=r"rolls\['a'\] must be bool \[32, 128\], got"):
            pictures.piano_rolls(song, {"a": roll}, tmp_path / "x.png")
