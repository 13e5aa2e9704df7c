"""Songs with their structure: notes on a grid of sixteenths, chords by the beat, key, phrases.

`load` reads and `save` writes an .npz of songs with these fields, song i's part of an array being
array[ptr[i] : ptr[i + 1]]: song_id, title (may be missing), split, n_bars, bpm, key_tonic; notes
int [N, 5] / note_ptr: track, first tick, ticks, pitch, velocity, 4 ticks a sixteenth;
chord_per_beat / beat_ptr: index into chord_root and chord_mask (bit p: pitch class p); phrase int
[P, 3] / phrase_ptr: first bar, bars, letter. Other fields are not read.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

# sixteenths a beat, beats a bar: every song is in 4/4
STEPS, BEATS = 4, 4
BAR = STEPS * BEATS
PITCHES = 128
MELODY, BRIDGE, ACCOMPANIMENT = 0, 1, 2
PRIORS = ("time", "rep", "key", "bin", "phrase")
# what NumPy raises for files of other kinds, or cut short
_UNREADABLE = (
    AttributeError,
    BadZipFile,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    zlib.error,
)
# of the .npz files: ticks a sixteenth, and the velocity that is written
_TICKS, _VELOCITY = 4, 80


@dataclass(frozen=True)
class Song:
    """A song in 4/4.

    Args:
        title: Of the song, or file and number.
        notes: int [N, 4]: track (MELODY, BRIDGE, ACCOMPANIMENT), first step, number of steps (at
            least 1), MIDI pitch; a step is a sixteenth.
        num_bars: Length; notes may begin or end outside, which is cut off.
        root: Root of the chord of each beat, 0..11 with C = 0, -1 for none, int [4 num_bars].
        chroma: Pitch classes of the chord of each beat, bool [4 num_bars, 12].
        phrase: Label of the phrase of each bar, -1 for none, int [num_bars].
        tonic: Of the key, 0..11.
        bpm: Beats a minute.
        split: "train", "val" or "test" where the corpus says so, else "".
    """

    title: str
    notes: np.ndarray
    num_bars: int
    root: np.ndarray
    chroma: np.ndarray
    phrase: np.ndarray
    tonic: int
    bpm: float = 90.0
    split: str = ""

    @property
    def num_steps(self) -> int:
        """Number of sixteenths."""
        return BAR * self.num_bars

    def roll(self, *tracks: int) -> np.ndarray:
        """Return what sounds in the tracks (default all), bool [num_steps, 128]."""
        return self.rolls(*tracks)[0]

    def onsets(self, *tracks: int) -> np.ndarray:
        """Return what is struck in the tracks (default all), bool [num_steps, 128]."""
        return self.rolls(*tracks)[1]

    def rolls(self, *tracks: int) -> tuple[np.ndarray, np.ndarray]:
        """Return both, `roll` and `onsets`."""
        inside = np.isin(self.notes[:, 0], tracks) if tracks else slice(None)
        return draw(self.notes[inside, 1:], self.num_steps)

    def positions(self, prior: str) -> np.ndarray:
        """Return the position of each step under a prior, int [num_steps], "bin" [num_steps, 12].

        Args:
            prior: "time": 0, 1, 2, ...; "rep": chords numbered by first appearance; "key": root
                above the tonic 0..11, 12 for no chord, 13 more for minor thirds; "bin": pitch
                classes of the chord, 0 or 1; "phrase": phrases by first appearance.
        """
        if prior == "time":
            return np.arange(self.num_steps)
        if prior == "rep":
            chords = [(int(r), c.tobytes()) for r, c in zip(self.root, self.chroma, strict=True)]
            return np.repeat(by_first_appearance(chords), STEPS)
        if prior == "key":
            return np.repeat(degrees(self.root, self.chroma, self.tonic), STEPS)
        if prior == "bin":
            return np.repeat(self.chroma.astype(np.int64), STEPS, axis=0)
        if prior == "phrase":
            return np.repeat(by_first_appearance(self.phrase.tolist()), BAR)
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")

    def cut(self, first: int, bars: int) -> Song:
        """Return `bars` bars from bar `first` on; what sounds before is cut at its beginning."""
        if not 0 <= first <= first + bars <= self.num_bars or bars < 1:
            raise ValueError(
                f"bars {first} to {first + bars} must lie in the song of {self.num_bars} bars"
            )
        notes = self.notes - np.array([0, first * BAR, 0, 0])
        inside = (notes[:, 1] < bars * BAR) & (notes[:, 1] + notes[:, 2] > 0)
        beats = slice(first * BEATS, (first + bars) * BEATS)
        return Song(
            f"{self.title}, bars {first + 1} to {first + bars}",
            notes[inside],
            bars,
            self.root[beats],
            self.chroma[beats],
            self.phrase[first : first + bars],
            self.tonic,
            self.bpm,
            self.split,
        )


def draw(notes: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what sounds and what is struck, bool [num_steps, 128] each.

    Args:
        notes: int [N, 3]: first step, number of steps, MIDI pitch; what lies outside is cut off.
        num_steps: Length of the rolls.
    """
    roll, onset = np.zeros((2, num_steps, PITCHES), dtype=bool)
    for step, steps, pitch in notes:
        if step + steps > 0 and 0 <= pitch < PITCHES:
            roll[max(step, 0) : step + steps, pitch] = True
            if 0 <= step < num_steps:
                onset[step, pitch] = True
    return roll, onset


def notes_of(roll: np.ndarray, onset: np.ndarray | None = None) -> np.ndarray:
    """Return the notes of rolls, the reverse of `draw`, by pitch, then step: int [N, 3].

    Args:
        roll: What sounds, bool [T, P].
        onset: What is struck, bool [T, P]: a note held there begins anew. Without it notes that
            follow each other at one pitch are one.
    """
    onset = np.zeros_like(roll) if onset is None else onset
    silence = np.zeros((1, roll.shape[1]), dtype=bool)
    before, after = np.concatenate((silence, roll[:-1])), np.concatenate((roll[1:], silence))
    anew = np.concatenate((onset[1:], silence))
    # in an order in which first and last steps match
    pitch, first = np.nonzero((roll & (onset | ~before)).T)
    last = np.nonzero((roll & (anew | ~after)).T)[1]
    return np.stack((first, last - first + 1, pitch), axis=1)


def runs(labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each run of equal rows of [N] or [N, ...]."""
    flat = np.asarray(labels).reshape(len(labels), -1)
    edges = np.flatnonzero((flat[1:] != flat[:-1]).any(1)) + 1
    yield from itertools.pairwise([0, *edges.tolist(), len(flat)])


def by_first_appearance(labels: Iterable[Hashable]) -> np.ndarray:
    """Return labels numbered 0, 1, ... in the order in which they first appear, int [N]."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def degrees(root: np.ndarray, chroma: np.ndarray, tonic: int) -> np.ndarray:
    """Return the roots above the tonic, 12 for no chord, 13 more for minor thirds, int [N].

    Args:
        root: Of each chord, 0..11, -1 for none, [N].
        chroma: Its pitch classes, bool [N, 12].
        tonic: Of the key, 0..11.
    """
    minor = chroma[np.arange(len(root)), (root + 3) % 12]
    return np.where(root < 0, 12, (root - tonic) % 12 + 13 * minor)


def load(path: Path | str) -> list[Song]:
    """Return the songs of an .npz file; its fields are above.

    Raises:
        ValueError: there is no such file, or it is not in this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    try:
        # NumPy leaves what is no archive open
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        return [_song(data, i, path.stem) for i in range(len(data["n_bars"]))]
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not in the expected format: {error!r}") from error


def _song(data: dict[str, np.ndarray], i: int, name: str) -> Song:
    def part(field: str, pointer: str) -> np.ndarray:
        return data[field][data[pointer][i] : data[pointer][i + 1]].astype(np.int64)

    notes, chord, bars = (
        part("notes", "note_ptr"),
        part("chord_per_beat", "beat_ptr"),
        int(data["n_bars"][i]),
    )
    if len(chord) != BEATS * bars:
        raise ValueError(f"song {i} has {len(chord)} beats in {bars} bars, expected {BEATS * bars}")
    start = np.round(notes[:, 1] / _TICKS).astype(np.int64)
    end = np.round((notes[:, 1] + notes[:, 2]) / _TICKS).astype(np.int64)
    mask = data["chord_mask"].astype(np.int64)[chord]
    letters = np.full(bars, -1)
    for first, size, label in part("phrase", "phrase_ptr"):
        # capitals are sung: the same letter is the same material
        letters[first : first + size] = label + 32 if _is_capital(label) else label
    untitled = f"{name}, song {i} (number {int(data['song_id'][i])})"
    return Song(
        str(data["title"][i]) if "title" in data else untitled,
        np.stack((notes[:, 0], start, np.maximum(end - start, 1), notes[:, 3]), axis=1),
        bars,
        data["chord_root"].astype(np.int64)[chord],
        (mask[:, None] >> np.arange(12) & 1).astype(bool),
        letters,
        int(data["key_tonic"][i]),
        float(data["bpm"][i]),
        str(data["split"][i]),
    )


def save(songs: Sequence[Song], path: Path | str) -> None:
    """Write songs to an .npz file from which `load` returns them as they are.

    Raises:
        ValueError: a phrase is labelled 65..90, the codes of capitals, which `load` takes for small
            letters, or below -1.
    """
    chords: dict[tuple[int, int], int] = {}
    notes, beats, phrases = [], [], []
    for song in songs:
        bad = song.phrase[(song.phrase < -1) | _is_capital(song.phrase)]
        if len(bad):
            raise ValueError(f"phrase must be -1, 0..64 or above 90, got {bad[0]} in {song.title}")
        track, start, steps, pitch = song.notes.reshape(-1, 4).T
        velocity = np.full_like(pitch, _VELOCITY)
        notes.append(np.stack((track, start * _TICKS, steps * _TICKS, pitch, velocity), axis=1))
        masks = song.chroma @ (1 << np.arange(12))
        pairs = zip(song.root.tolist(), masks.tolist(), strict=True)
        beats.append(np.array([chords.setdefault(chord, len(chords)) for chord in pairs], int))
        spans = [(a, b - a, song.phrase[a]) for a, b in runs(song.phrase) if song.phrase[a] >= 0]
        phrases.append(np.array(spans, dtype=np.int64).reshape(-1, 3))
    root, mask = np.array(list(chords), dtype=np.int64).reshape(-1, 2).T
    np.savez_compressed(
        path,
        song_id=np.arange(len(songs)),
        title=np.array([song.title for song in songs], dtype=str),
        split=np.array([song.split for song in songs], dtype=str),
        n_bars=np.array([song.num_bars for song in songs], dtype=np.int64),
        bpm=np.array([song.bpm for song in songs], dtype=np.float64),
        key_tonic=np.array([song.tonic for song in songs], dtype=np.int64),
        chord_root=root,
        chord_mask=mask,
        **_ragged("notes", "note_ptr", notes, (0, 5)),
        **_ragged("chord_per_beat", "beat_ptr", beats, (0,)),
        **_ragged("phrase", "phrase_ptr", phrases, (0, 3)),
    )


def _is_capital(label: np.ndarray) -> np.ndarray:
    return (ord("A") <= label) & (label <= ord("Z"))


def _ragged(
    field: str, pointer: str, parts: list[np.ndarray], empty: tuple[int, ...]
) -> dict[str, np.ndarray]:
    ends = np.cumsum([0, *map(len, parts)])
    whole = np.concatenate([np.zeros(empty, dtype=np.int64), *parts])
    return {field: whole.astype(np.int32), pointer: ends}
