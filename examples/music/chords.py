"""Names of chords, from roots and pitch classes."""

from __future__ import annotations

import numpy as np

NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
# semitones above the root; of chords with the same tones the first is the name
_KINDS = {
    (0, 4, 7): "",
    (0, 3, 7): "m",
    (0, 4, 7, 10): "7",
    (0, 3, 7, 10): "m7",
    (0, 4, 7, 11): "maj7",
    (0, 3, 6): "dim",
    (0, 3, 6, 9): "dim7",
    (0, 3, 6, 10): "m7b5",
    (0, 4, 8): "aug",
    (0, 5, 7): "sus4",
    (0, 2, 7): "sus2",
    (0, 5, 7, 10): "7sus4",
    (0, 4, 7, 9): "6",
    (0, 3, 7, 9): "m6",
    (0, 3, 7, 11): "m(maj7)",
    (0, 2, 4, 7): "add9",
    (0, 2, 3, 7): "m(add9)",
    (0, 2, 4, 7, 10): "9",
    (0, 2, 3, 7, 10): "m9",
    (0, 2, 4, 7, 11): "maj9",
    (0, 7): "5",
    (0,): "",
}


def chord_name(root: int, chroma: np.ndarray) -> str:
    """Return the name of a chord: C, Am, G7, Dm7/C, N.C. where there is none.

    A chord that is known from another root is named from that, over this one. Otherwise * stands
    for tones besides those of the largest known chord.

    Args:
        root: 0..11 with C = 0, or -1 for none.
        chroma: Its pitch classes, bool [12].
    Raises:
        ValueError: an argument is not as above.
    """
    chroma = np.asarray(chroma).astype(bool)
    if chroma.shape != (12,):
        raise ValueError(f"chroma must be [12], got {list(chroma.shape)}")
    if not -1 <= root < 12:
        raise ValueError(f"root must be -1 to 11, got {root}")
    if root < 0:
        return "N.C."
    for shift in range(12):
        other = (root + shift) % 12
        kind = _KINDS.get(_tones(other, chroma))
        if kind is not None:
            return NOTES[other] + kind + (f"/{NOTES[root]}" if shift else "")
    tones = set(_tones(root, chroma))
    inside = [known for known in _KINDS if tones.issuperset(known)]
    return NOTES[root] + (_KINDS[max(inside, key=len)] if inside else "") + "*"


def _tones(root: int, chroma: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.roll(chroma, -root)).tolist())
