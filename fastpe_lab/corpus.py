"""Songs with their structure: notes on a grid of sixteenths, chords by the beat, key, phrases.

`load` reads and `save` writes an .npz of songs with these fields:

* for each song: song_id, title (may be missing), split, n_bars, bpm, key_tonic
* notes, int [N, 5], with note_ptr: track, first tick, ticks, pitch, velocity; 4 ticks a sixteenth
* chord_per_beat, with beat_ptr: index into chord_root and chord_mask (bit p is pitch class p)
* phrase, int [P, 3], with phrase_ptr: first bar, number of bars, letter

Song i has array[ptr[i] : ptr[i + 1]]. Other fields are ignored.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import checks

# sixteenths a beat, beats a bar: every song is in 4/4
STEPS, BEATS = 4, 4
BAR = STEPS * BEATS
PITCHES = 128
MELODY, BRIDGE, ACCOMPANIMENT = 0, 1, 2
PRIORS = ("time", "rep", "key", "bin", "phrase")
SPLITS = ("", "train", "val", "test")
# more than an hour: a longer song has a broken length
MOST_BARS = 5000
# beats a minute; MIDI can say no less than 3.6
SLOWEST, FASTEST = 4, 1000
# .npz files have these ticks a sixteenth, and we write this velocity
_TICKS, _VELOCITY = 4, 80
# {array in an .npz file: (its shape, with None for any size; kinds of its dtype)}
_ARRAYS: dict[str, tuple[tuple[int | None, ...], str]] = {
    "n_bars": ((None,), "iu"),
    "bpm": ((None,), "iuf"),
    "key_tonic": ((None,), "iu"),
    "split": ((None,), "U"),
    "notes": ((None, 5), "iu"),
    "chord_per_beat": ((None,), "iu"),
    "phrase": ((None, 3), "iu"),
    "chord_root": ((None,), "iu"),
    "chord_mask": ((None,), "iu"),
}
# {array that says where each song's part begins: the array with the parts}
_POINTERS = {"note_ptr": "notes", "beat_ptr": "chord_per_beat", "phrase_ptr": "phrase"}


@dataclass(frozen=True)
class Song:
    """A song in 4/4.

    Args:
        title: title, or file and number.
        notes: int [N, 4]: track (MELODY, BRIDGE, ACCOMPANIMENT), first step, number of steps (at
            least 1), MIDI pitch; a step is a sixteenth.
        num_bars: number of bars; parts of notes outside are cut off.
        root: root of each beat's chord, 0..11 with C = 0, -1 for none, int [4 num_bars].
        chroma: pitch classes of each beat's chord, bool [4 num_bars, 12].
        phrase: label of each bar's phrase, -1 for none, int [num_bars].
        tonic: tonic of the key, 0..11.
        bpm: beats a minute.
        split: "train", "val" or "test" if the corpus says so, else "".
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
        """Return the notes that sound in the tracks (default all), bool [num_steps, 128]."""
        return self.rolls(*tracks)[0]

    def onsets(self, *tracks: int) -> np.ndarray:
        """Return the notes that begin in the tracks (default all), bool [num_steps, 128]."""
        return self.rolls(*tracks)[1]

    def rolls(self, *tracks: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `roll` and `onsets`."""
        inside = np.isin(self.notes[:, 0], tracks) if tracks else slice(None)
        return draw(self.notes[inside, 1:], self.num_steps)

    def positions(self, prior: str) -> np.ndarray:
        """Return each step's position under a prior, int [num_steps], or [num_steps, 12] for "bin".

        Args:
            prior: "time": 0, 1, 2, ...; "rep": chords, numbered as they appear; "key": root above
                the tonic 0..11, 12 for no chord, 13 more for minor thirds; "bin": pitch classes of
                the chord, 0 or 1; "phrase": phrases, numbered as they appear.
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
        """Return `bars` bars from bar `first` on; notes that began earlier lose their beginning."""
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
    """Return the notes that sound and the notes that begin, bool [num_steps, 128] each.

    Args:
        notes: int [N, 3]: first step, number of steps, MIDI pitch; parts outside are cut off.
        num_steps: length of the rolls.
    """
    onset = np.zeros((num_steps, PITCHES), dtype=bool)
    step, _, pitch = notes.T
    inside = (step >= 0) & (step < num_steps) & (pitch >= 0) & (pitch < PITCHES)
    onset[step[inside], pitch[inside]] = True
    return count(notes, num_steps) > 0, onset


def count(notes: np.ndarray, num_steps: int) -> np.ndarray:
    """Return how many notes sound at each step and pitch, int32 [num_steps, 128].

    Args:
        notes: notes as for `draw`.
        num_steps: length of the result.
    """
    step, steps, pitch = notes[(notes[:, 2] >= 0) & (notes[:, 2] < PITCHES)].T
    change = np.zeros((num_steps + 1, PITCHES), dtype=np.int32)
    np.add.at(change, (step.clip(0, num_steps), pitch), 1)
    np.subtract.at(change, ((step + steps).clip(0, num_steps), pitch), 1)
    return change[:-1].cumsum(0, dtype=np.int32)


def notes_of(roll: np.ndarray, onset: np.ndarray | None = None) -> np.ndarray:
    """Return the notes in rolls, ordered by pitch and step, int [N, 3]: the reverse of `draw`.

    Args:
        roll: notes that sound, bool [T, P].
        onset: notes that begin, bool [T, P]. Without it, notes that follow each other at one pitch
            are one note.
    """
    onset = np.zeros_like(roll) if onset is None else onset
    silence = np.zeros((1, roll.shape[1]), dtype=bool)
    before, after = np.concatenate((silence, roll[:-1])), np.concatenate((roll[1:], silence))
    anew = np.concatenate((onset[1:], silence))
    # transposed, so that first and last steps have the same order
    pitch, first = np.nonzero((roll & (onset | ~before)).T)
    last = np.nonzero((roll & (anew | ~after)).T)[1]
    return np.stack((first, last - first + 1, pitch), axis=1)


def runs(labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each run of equal rows of [N] or [N, ...]."""
    flat = np.asarray(labels).reshape(len(labels), -1)
    edges = np.flatnonzero((flat[1:] != flat[:-1]).any(1)) + 1
    yield from itertools.pairwise([0, *edges.tolist(), len(flat)])


def by_first_appearance(labels: Iterable[Hashable]) -> np.ndarray:
    """Return labels numbered 0, 1, ... as they first appear, int [N]."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def degrees(root: np.ndarray, chroma: np.ndarray, tonic: int) -> np.ndarray:
    """Return the roots above the tonic, 12 for no chord, 13 more for minor thirds, int [N].

    Args:
        root: root of each chord, 0..11, -1 for none, [N].
        chroma: pitch classes of each chord, bool [N, 12].
        tonic: tonic of the key, 0..11.
    """
    minor = chroma[np.arange(len(root)), (root + 3) % 12]
    return np.where(root < 0, 12, (root - tonic) % 12 + 13 * minor)


def checked(song: Song) -> Song:
    """Return a song that was read from a file, with its title on one line.

    Raises:
        ValueError: a field breaks the rules of `Song`, the song is longer than MOST_BARS bars, or
            its tempo is not in SLOWEST to FASTEST.
    """
    kinds = {"title": str, "num_bars": int, "tonic": int, "bpm": (int, float), "split": str}
    checks.record(vars(song), kinds)
    checks.within("num_bars", song.num_bars, 1, MOST_BARS)
    beats = BEATS * song.num_bars
    track, start, steps, pitch = checks.array("notes", song.notes, (None, 4), "i").T
    for name, value, low, high in (
        ("track of a note", track, MELODY, ACCOMPANIMENT),
        ("first step of a note", start, -BAR * MOST_BARS, BAR * MOST_BARS),
        ("steps of a note", steps, 1, BAR * MOST_BARS),
        ("pitch of a note", pitch, 0, PITCHES - 1),
        ("root of a chord", checks.array("root", song.root, (beats,), "i"), -1, 11),
        ("phrase", checks.array("phrase", song.phrase, (song.num_bars,), "i"), -1, 2**31 - 1),
        ("tonic", song.tonic, 0, 11),
        ("bpm", song.bpm, SLOWEST, FASTEST),
    ):
        checks.within(name, value, low, high)
    checks.array("chroma", song.chroma, (beats, 12), "b")
    if song.split not in SPLITS:
        raise ValueError(f"split must be of {SPLITS}, got {checks.printable(repr(song.split))}")
    return replace(song, title=checks.printable(song.title))


def load(path: Path | str) -> list[Song]:
    """Return the songs of an .npz file in the format above.

    Raises:
        ValueError: there is no such file, or it is not in this format.
    """
    path = Path(path)
    name = checks.printable(path)
    if not path.is_file():
        raise ValueError(f"data file {name} does not exist")
    where = ""
    try:
        data, songs = _read(path), []
        for i in range(len(data["n_bars"])):
            where = f"song {i}: "
            songs.append(_song(data, i, path.stem))
    except ValueError as error:
        raise ValueError(f"{name} is not in the expected format: {where}{error}") from error
    return songs


def _read(path: Path) -> dict[str, np.ndarray]:
    # all arrays, with the right shapes and kinds, and pointers that stay inside
    wanted = {**_ARRAYS, **dict.fromkeys(_POINTERS, ((None,), "iu"))}
    try:
        # NumPy leaves a file open if it is no archive
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            more = {"title": ((None,), "U")} if "title" in file else {"song_id": ((None,), "iu")}
            wanted |= more
            data = {name: file[name] for name in wanted if name in file}
    except Exception as error:
        raise ValueError(checks.reason(error)) from error
    for name, (shape, kinds) in wanted.items():
        checks.array(name, data.get(name), shape, kinds)
    count = len(data["n_bars"])
    for name in ("bpm", "key_tonic", "split", *more):
        checks.array(name, data[name], (count,), wanted[name][1])
    checks.array("chord_mask", data["chord_mask"], data["chord_root"].shape, "iu")
    for name, of in _POINTERS.items():
        at = checks.array(name, data[name], (count + 1,), "iu").astype(np.int64)
        checks.within(name, at, 0, len(data[of]))
        if (np.diff(at) < 0).any():
            raise ValueError(f"{name} must not fall, got {at[:-1][np.diff(at) < 0][0]} and less")
    return data


def _song(data: dict[str, np.ndarray], i: int, name: str) -> Song:
    def part(field: str, pointer: str) -> np.ndarray:
        return data[field][data[pointer][i] : data[pointer][i + 1]].astype(np.int64)

    bars, longest = int(data["n_bars"][i]), _TICKS * BAR * MOST_BARS
    checks.within("n_bars", bars, 1, MOST_BARS)
    notes, phrases = part("notes", "note_ptr"), part("phrase", "phrase_ptr")
    checks.within("first tick of a note", notes[:, 1], -longest, longest)
    checks.within("ticks of a note", notes[:, 2], 0, longest)
    start = np.round(notes[:, 1] / _TICKS).astype(np.int64)
    end = np.round((notes[:, 1] + notes[:, 2]) / _TICKS).astype(np.int64)
    chord = checks.array("chord_per_beat", part("chord_per_beat", "beat_ptr"), (BEATS * bars,), "i")
    checks.within("chord_per_beat", chord, 0, len(data["chord_root"]) - 1)
    mask = data["chord_mask"].astype(np.int64)[chord]
    checks.within("chord_mask", mask, 0, 2**12 - 1)
    letters = np.full(bars, -1)
    checks.within("first bar of a phrase", phrases[:, 0], 0, bars - 1)
    checks.within("bars of a phrase", phrases[:, 1], 0, bars)
    checks.within("end of a phrase", phrases[:, 0] + phrases[:, 1], 0, bars)
    checks.within("letter of a phrase", phrases[:, 2], 0, 2**31 - 1)
    for first, size, label in phrases:
        # a capital marks a sung phrase with the material of its small letter
        letters[first : first + size] = label + 32 if _is_capital(label) else label
    if "title" in data:
        title = str(data["title"][i])
    else:
        title = f"{name}, song {i} (number {int(data['song_id'][i])})"
    return checked(
        Song(
            title,
            np.stack((notes[:, 0], start, np.maximum(end - start, 1), notes[:, 3]), axis=1),
            bars,
            data["chord_root"].astype(np.int64)[chord],
            (mask[:, None] >> np.arange(12) & 1).astype(bool),
            letters,
            int(data["key_tonic"][i]),
            float(data["bpm"][i]),
            str(data["split"][i]),
        )
    )


def save(songs: Sequence[Song], path: Path | str) -> None:
    """Write songs to an .npz file from which `load` returns the same songs.

    Raises:
        ValueError: a phrase has a label below -1, or 65..90. These are the codes of capitals, which
            `load` turns into small letters.
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
