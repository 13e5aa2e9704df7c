"""Songs made up for tests, and the modules of examples and benchmarks."""

import importlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from fastpe_lab import corpus

ROOT = Path(__file__).parents[2]
ACCOMPANIMENT, BAR, BRIDGE, MELODY = (
    getattr(corpus, name) for name in ("ACCOMPANIMENT", "BAR", "BRIDGE", "MELODY")
)
Song = corpus.Song
# I vi IV V and others, as root and whether minor
_CHORDS = ((0, 0), (9, 1), (5, 0), (7, 0), (2, 1), (4, 1))


def example(name):
    """Return examples/name.py or benchmarks/name.py."""
    return importlib.import_module(name)


def module(name):
    """Return examples/music/name.py."""
    return importlib.import_module(f"music.{name}")


def make_song(seed=0, bars=4, title="song"):
    """Return a song of random notes, some of them beyond its ends, chords and phrases."""
    rng = np.random.default_rng(seed)
    notes = np.stack(
        (
            rng.integers(0, 3, 40),
            rng.integers(-8, BAR * bars, 40),
            rng.integers(1, 13, 40),
            rng.integers(36, 84, 40),
        ),
        axis=1,
    )
    chord = rng.integers(0, 3, 4 * bars)
    return Song(
        title,
        notes,
        bars,
        np.array([-1, 0, 9])[chord],
        np.array([[p in c for p in range(12)] for c in ((), (0, 4, 7), (9, 0, 4))])[chord],
        rng.choice([-1, 97, 98, 220], bars),
        int(rng.integers(12)),
        88.5,
        "train",
    )


def assert_same(song, wanted):
    for field in fields(Song):
        found, expected = getattr(song, field.name), getattr(wanted, field.name)
        assert np.array_equal(found, expected), field.name


def assert_sane(song):
    """Check the fields of a song that was read from a file."""
    assert 4 <= song.bpm <= 1000
    assert 1 <= song.num_bars <= 5000
    assert 0 <= song.tonic < 12
    assert song.split in ("", "train", "val", "test")
    assert song.title.isprintable()
    track, start, steps, pitch = song.notes.T
    assert set(track) <= {MELODY, BRIDGE, ACCOMPANIMENT}
    assert (np.abs(start) <= 80_000).all()
    assert ((steps >= 1) & (steps <= 80_000)).all()
    assert ((pitch >= 0) & (pitch < 128)).all()
    assert song.root.shape == (4 * song.num_bars,)
    assert ((song.root >= -1) & (song.root < 12)).all()
    assert song.chroma.shape == (4 * song.num_bars, 12)
    assert song.phrase.shape == (song.num_bars,)
    assert (song.phrase >= -1).all()
    assert all(roll.shape == (16 * song.num_bars, 128) for roll in song.rolls())


def notes_of(cadence, shift=0, beats=4):
    """Return notes of chords `beats` long each, the root in the bass, and roots and chroma."""
    notes, roots, chroma = [], [], []
    for i, (root, tones) in enumerate(cadence):
        root, tones = (root + shift) % 12, [(t + shift) % 12 for t in tones]
        pitches = [36 + root, *(60 + t for t in tones)]
        notes += [(ACCOMPANIMENT, 4 * beats * i, 4 * beats, pitch) for pitch in pitches]
        roots += [root] * beats
        chroma += [[p in tones for p in range(12)]] * beats
    return np.array(notes), np.array(roots), np.array(chroma)


def song_of_chords(seed=0, bars=20, split="train"):
    """Return a song whose accompaniment strikes its chord in each half bar, under any melody."""
    generator = np.random.default_rng(seed)
    notes, root = [], np.zeros(4 * bars, dtype=np.int64)
    chroma = np.zeros((4 * bars, 12), dtype=bool)
    for half in range(2 * bars):
        base, minor = _CHORDS[generator.integers(len(_CHORDS))]
        tones = (base, base + 4 - minor, base + 7)
        beats = slice(2 * half, 2 * half + 2)
        root[beats] = base
        chroma[beats, [tone % 12 for tone in tones]] = True
        notes += [[ACCOMPANIMENT, 8 * half, 8, 48 + tone % 12] for tone in tones]
        notes += [[MELODY, 8 * half + 4 * i, 4, 72 + int(generator.integers(12))] for i in range(2)]
    phrase = np.repeat(np.arange(97, 97 + -(-bars // 4)), 4)[:bars]
    return Song(f"song {seed}", np.array(notes), bars, root, chroma, phrase, 0, split=split)


def save_songs(path, train=6, test=2, bars=20):
    """Write an .npz of such songs; return its path."""
    splits = ["train"] * train + ["test"] * test
    corpus.save([song_of_chords(i, bars, split) for i, split in enumerate(splits)], path)
    return path
