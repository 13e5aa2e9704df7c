"""Songs made up for tests, and the package of examples/music."""

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def _load_package():
    # under a name of its own, as benchmarks/music.py is another
    folder = ROOT / "examples" / "music"
    spec = importlib.util.spec_from_file_location(
        "music_of_examples", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return spec.name


PACKAGE = _load_package()
# the package has put their folder on the path; tests take these from here
import corpus  # noqa: E402, F401
from corpus import ACCOMPANIMENT, BAR, BRIDGE, MELODY, Song  # noqa: E402, F401


def module(name):
    """Return examples/music/name.py."""
    return importlib.import_module(f"{PACKAGE}.{name}")


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
