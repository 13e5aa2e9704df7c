"""The songs that examples train on: chorales, an .npz corpus, or MIDI files."""

from __future__ import annotations

from pathlib import Path

import corpus
from . import chorales, midi
from .split import split
from corpus import Song


def songs(path: Path | str | None = None, cache: Path | None = None) -> list[Song]:
    """Return songs with their splits, "train", "val" and "test".

    MIDI files that are no song are skipped, with a line each and a count.

    Args:
        path: None for Bach's chorales, an .npz file (`corpus.load`), or a folder of MIDI files.
        cache: Where the chorales are kept once parsed, an .npz file.
    Raises:
        ImportError: what reads the songs is not installed.
        ValueError: there is no such file, it is not a corpus, or fewer than two songs are left.
    """
    if path is None:
        return chorales.load(cache)
    path = Path(path)
    if path.suffix == ".npz":
        return corpus.load(path)
    if not path.is_dir():
        raise ValueError(f"data must be an .npz file or a folder of MIDI files, got {path}")
    found, skipped = midi.read_folder(path)
    for line in skipped:
        print(f"skipped {line}")
    if skipped:
        print(f"skipped {len(skipped)} of {len(skipped) + len(found)} files")
    if len(found) < 2:
        raise ValueError(
            f"{path} must hold two songs or more, to train on and to test on, got {len(found)}"
        )
    return split(found)
