"""Songs and their files: what sounds, positions, cuts, the .npz format (fastpe_lab/corpus.py)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from songs import ACCOMPANIMENT, BAR, BRIDGE, MELODY, assert_same, corpus, make_song


@pytest.mark.parametrize("tracks", [(), (MELODY,), (BRIDGE, ACCOMPANIMENT)])
def test_roll_and_onsets_step_by_step(tracks):
    song = make_song()
    roll, onsets = song.roll(*tracks), song.onsets(*tracks)
    assert roll.shape == onsets.shape == (64, 128)
    for step, pitch in itertools.product(range(64), range(128)):
        mine = [n for n in song.notes if n[3] == pitch and (not tracks or n[0] in tracks)]
        assert roll[step, pitch] == any(n[1] <= step < n[1] + n[2] for n in mine)
        assert onsets[step, pitch] == any(n[1] == step for n in mine)


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_is_its_part_of_the_song(seed):
    song = make_song(seed, bars=8)
    cut = song.cut(3, 4)
    part = slice(3 * BAR, 7 * BAR)
    assert (cut.num_bars, cut.num_steps, cut.split) == (4, 4 * BAR, "train")
    assert np.array_equal(cut.roll(), song.roll()[part])
    assert np.array_equal(cut.onsets(), song.onsets()[part])
    for prior in ("key", "bin"):
        assert np.array_equal(cut.positions(prior), song.positions(prior)[part])
    for prior in ("time", "rep", "phrase"):
        # numbered anew
        wanted = corpus.by_first_appearance(song.positions(prior)[part].tolist())
        assert np.array_equal(cut.positions(prior), wanted)


@pytest.mark.parametrize(("first", "bars"), [(-1, 2), (3, 2), (0, 0), (4, 1)])
def test_a_cut_must_lie_in_the_song(first, bars):
    with pytest.raises(ValueError, match="must lie in the song of 4 bars"):
        make_song().cut(first, bars)


@pytest.mark.parametrize("semitones", range(12))
def test_transposition_moves_bin_and_leaves_the_others(semitones):
    song = make_song(1)
    moved = replace(
        song,
        notes=song.notes + np.array([0, 0, 0, semitones]),
        root=np.where(song.root < 0, -1, (song.root + semitones) % 12),
        chroma=np.roll(song.chroma, semitones, axis=1),
        tonic=(song.tonic + semitones) % 12,
    )
    for prior in ("time", "rep", "key", "phrase"):
        assert np.array_equal(moved.positions(prior), song.positions(prior))
    wanted = np.roll(song.positions("bin"), semitones, axis=1)
    assert np.array_equal(moved.positions("bin"), wanted)
    assert np.array_equal(moved.roll(), np.roll(song.roll(), semitones, axis=1))


def test_key_of_known_chords():
    # in D: none, D, E minor, A7
    chords = ((), (2, 6, 9), (4, 7, 11), (9, 1, 4, 7))
    chroma = np.array([[p in chord for p in range(12)] for chord in chords])
    song = replace(make_song(bars=1), root=np.array([-1, 2, 4, 9]), chroma=chroma, tonic=2)
    assert song.positions("key")[::4].tolist() == [12, 0, 13 + 2, 7]


def test_priors_are_named():
    with pytest.raises(ValueError, match="one of time, rep, key, bin, phrase, got 'keys'"):
        make_song().positions("keys")


# files


def test_saved_songs_are_loaded_as_they_were(tmp_path):
    songs = [make_song(seed, bars, f"no {seed}") for seed, bars in enumerate((1, 4, 9))]
    songs.append(replace(make_song(), notes=np.zeros((0, 4), dtype=np.int64), split=""))
    for wanted in (songs, []):
        corpus.save(wanted, tmp_path / "songs.npz")
        loaded = corpus.load(tmp_path / "songs.npz")
        assert len(loaded) == len(wanted)
        for pair in zip(loaded, wanted, strict=True):
            assert_same(*pair)


def test_capitals_are_small_letters(tmp_path):
    path = tmp_path / "songs.npz"
    corpus.save([make_song(), make_song(1)], path)
    with np.load(path) as file:
        data = dict(file)
    assert 97 in data["phrase"]
    capitals = np.where(data["phrase"][:, 2] == 97, 65, data["phrase"][:, 2])
    data["phrase"][:, 2] = capitals
    del data["title"]
    np.savez(path, **data)
    loaded = corpus.load(path)
    assert loaded[1].title == "songs, song 1 (number 1)"
    for song, wanted in zip(loaded, (make_song(), make_song(1)), strict=True):
        assert np.array_equal(song.phrase, wanted.phrase)
    with pytest.raises(ValueError, match=r"phrase must be .* got 65 in song"):
        corpus.save([replace(make_song(), phrase=np.full(4, 65))], path)


def _damage(kind, path):
    corpus.save([make_song()], path)
    whole = path.read_bytes()
    with np.load(path) as file:
        data = dict(file)
    if kind == "missing":
        path.unlink()
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "beats":
        np.savez(path, **{**data, "n_bars": data["n_bars"] + 1})
    elif kind == "fields":
        np.savez(path, notes=data["notes"])
    else:
        parts = {"empty": b"", "text": b"notes", "cut": whole[: len(whole) // 2]}
        flipped = bytearray(whole)
        flipped[200:260] = bytes(60)
        path.write_bytes({**parts, "flipped": bytes(flipped)}[kind])


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "cut", "flipped", "array", "fields", "beats"]
)
def test_files_in_no_such_format(kind, tmp_path):
    path = tmp_path / "songs.npz"
    _damage(kind, path)
    wanted = "does not exist" if kind == "missing" else "is not in the expected format"
    with pytest.raises(ValueError, match=rf"songs\.npz {wanted}"):
        corpus.load(path)
