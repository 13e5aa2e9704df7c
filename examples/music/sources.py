"""The songs that examples train on: chorales, an .npz corpus, or MIDI files."""

from __future__ import annotations

from pathlib import Path

from fastpe_lab import corpus
from fastpe_lab.corpus import Song

from . import chorales, midi
from .split import split


def songs(
    path: Path | str | None = None, cache: Path | None = None, at_least: int = 2
) -> list[Song]:
    """Return songs with their splits, "train", "val" and "test".

    MIDI files without a song are skipped, with a line each and a count.

    Args:
        path: None for Bach's chorales, an .npz file (`corpus.load`), a MIDI file, or a folder of
            MIDI files.
        cache: .npz file that keeps the parsed chorales.
        at_least: number of songs that must be found; a single song has no split.
    Raises:
        ImportError: a package that reads the songs is not installed.
        ValueError: there is no such file, it is not a corpus, or it has too few songs.
    """
    if path is None:
        return chorales.load(cache)
    path = Path(path)
    if path.suffix == ".npz":
        return corpus.load(path)
    if path.suffix.lower() in midi.SUFFIXES and path.is_file():
        found = [midi.read(path)]
    elif path.is_dir():
        found = _folder(path)
    else:
        raise ValueError(f"data must be an .npz file, a MIDI file or a folder of them, got {path}")
    if len(found) < at_least:
        raise ValueError(f"{path} must hold {at_least} songs or more, got {len(found)}")
    return split(found) if len(found) > 1 else found


def _folder(path: Path) -> list[Song]:
    found, skipped = midi.read_folder(path)
    for line in skipped:
        print(f"skipped {line}")
    if skipped:
        print(f"skipped {len(skipped)} of {len(skipped) + len(found)} files")
    return found
