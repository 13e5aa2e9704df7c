"""Songs made for tests, and the modules of the examples."""

import importlib
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))
importlib.import_module("music")
corpus = importlib.import_module("corpus")

# I vi IV V and others, as root and minor
_CHORDS = ((0, 0), (9, 1), (5, 0), (7, 0), (2, 1), (4, 1))


def make_song(seed=0, bars=20, split="train"):
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
        notes += [[corpus.ACCOMPANIMENT, 8 * half, 8, 48 + tone % 12] for tone in tones]
        notes += [
            [corpus.MELODY, 8 * half + 4 * i, 4, 72 + int(generator.integers(12))] for i in range(2)
        ]
    phrase = np.repeat(np.arange(97, 97 + -(-bars // 4)), 4)[:bars]
    return corpus.Song(f"song {seed}", np.array(notes), bars, root, chroma, phrase, 0, split=split)


def save_songs(path, train=6, test=2, bars=20):
    """Write an .npz of such songs; return its path."""
    splits = ["train"] * train + ["test"] * test
    corpus.save([make_song(i, bars, split) for i, split in enumerate(splits)], path)
    return path
