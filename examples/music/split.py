"""What is trained on, validated on, tested on: by number, so that it is the same every time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from fastpe_lab.corpus import Song, by_first_appearance


def split(songs: Sequence[Song], groups: Sequence[Hashable] | None = None) -> list[Song]:
    """Return the songs, of each ten the first "val", the sixth "test", the others "train".

    Of fewer than six the last is "test", and the first "val" if there are three.

    Args:
        songs: At least two.
        groups: Label of each song; songs of one label stay together, and it is labels that are
            counted. Default: each is of its own.
    """
    numbers = by_first_appearance(range(len(songs)) if groups is None else groups).tolist()
    last = max(numbers, default=0)
    if last < 1:
        raise ValueError(f"songs must be two or more, to train on and to test on, got {last + 1}")
    names = {0: "val" if last > 1 else "train", last: "test"} if last < 5 else {0: "val", 5: "test"}
    pairs = zip(songs, numbers, strict=True)
    return [replace(song, split=names.get(number % 10, "train")) for song, number in pairs]
