"""Bach's chorales from music21 (examples/music/chorales.py), against what the scores show."""

import numpy as np
import pytest
import songs
from songs import ACCOMPANIMENT, BAR, MELODY, assert_same

chorales, sources = map(songs.module, ("chorales", "sources"))
pytest.importorskip("music21")
pytest.importorskip("tqdm")

# with a pickup; with phrases that come again; in 3/4
NAMES = ("bwv66.6", "bwv110.7", "bwv269")


@pytest.fixture(scope="module")
def scores():
    found = {path.stem: path for path in chorales.paths()}
    assert len(found) == len(chorales.paths()) > 400
    return [found[name] for name in NAMES]


@pytest.fixture(scope="module")
def parsed(scores):
    return chorales.parse(scores)


def test_parts_and_bars(parsed):
    assert [song.title for song in parsed] == ["bwv66.6", "bwv110.7"]
    assert [song.num_bars for song in parsed] == [10, 12]
    for song in parsed:
        assert set(song.notes[:, 0]) == {MELODY, ACCOMPANIMENT}
        melody, others = song.roll(MELODY), song.roll(ACCOMPANIMENT)
        sung = melody.any(1)
        # a pickup of one beat in the first bar, and one less in the last
        assert np.flatnonzero(sung)[[0, -1]].tolist() == [12, BAR * song.num_bars - 5]
        assert (melody.sum(1) == sung).all()
        assert (others.sum(1) <= 3).all()
        assert (others.argmax(1) < melody.argmax(1))[sung].all()
        assert (song.bpm, song.split) == (90, "")


def test_notes_of_the_soprano(parsed):
    notes = parsed[0].notes
    soprano = notes[notes[:, 0] == MELODY, 1:]
    # c#5 b4 | a4 b4 c#5 e5 |
    assert soprano[:6].tolist() == [
        [12, 2, 73],
        [14, 2, 71],
        [16, 4, 69],
        [20, 4, 71],
        [24, 4, 73],
        [28, 4, 76],
    ]
    # f#4 is tied over the last bar line: f#4 f#4 f#4~ | f#4 f#4 e#4 f#4
    assert soprano[-6:].tolist() == [
        [128, 8, 66],
        [136, 4, 66],
        [140, 8, 66],
        [148, 2, 66],
        [150, 2, 65],
        [152, 4, 66],
    ]


def test_phrases_end_at_fermatas(parsed):
    # fermatas on the third beats of bars 1, 2, 3, 5, 7 and 9; what follows is of the next bar
    labels = [0, 0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert (parsed[0].phrase - ord("a")).tolist() == labels
    # lines 1 and 2 are one melody, and so are the others from e5 d5 c#5 on
    assert (parsed[1].phrase - ord("a")).tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 1, 2, 2, 2]


def test_key_and_chords(parsed):
    song = parsed[0]
    assert song.tonic == 6  # f# minor
    # the first bar begins on f# minor, the last chord is F# major
    for beat, chord in ((4, [1, 6, 9]), (38, [1, 6, 10])):
        assert song.root[beat] == 6
        assert np.flatnonzero(song.chroma[beat]).tolist() == chord
    assert parsed[1].tonic == 11  # b minor


def test_the_cache_has_the_same(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(chorales, "paths", lambda: scores)
    cache = tmp_path / "below" / "chorales.npz"
    first = sources.songs(None, cache)
    assert [song.split for song in first] == ["train", "test"]
    assert [path.name for path in cache.parent.iterdir()] == ["chorales.npz"]
    # no score is parsed again
    monkeypatch.setattr(chorales, "parse", None)
    for pair in zip(sources.songs(None, cache), first, strict=True):
        assert_same(*pair)
