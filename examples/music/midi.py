"""MIDI files to songs and back, through symusic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpe_lab import checks, corpus
from fastpe_lab.corpus import (
    ACCOMPANIMENT,
    BAR,
    BEATS,
    BRIDGE,
    MELODY,
    MOST_BARS,
    PITCHES,
    STEPS,
    Song,
)

from .harmony import estimate_chords, estimate_key
from .optional import need

if TYPE_CHECKING:
    from symusic import Score

SUFFIXES = (".mid", ".midi")
# in names of tracks, best first
_SUNG = ("melody", "vocal", "lead")
# notes at a time, on average, up to which a track is a single voice: players let notes overlap
_ONE_VOICE = 1.25
# as many notes as the fullest voice has, times this: sparser ones are fills, not melodies; POP909's
# bridges are, and the sopranos of chorales are not
_FULL = 0.7
# ticks a beat, velocity and tempo for files that we write or that do not say
_TICKS, _VELOCITY, _BPM = 480, 80, 120.0


def read(path: Path | str, accompanied: bool = True) -> Song:
    """Return the song of a MIDI file in 4/4, on a grid of sixteenths.

    The melody is the track named melody, else vocal, else lead, else a track of a single voice that
    lies above the mean of all notes; of several such the highest that is not much sparser than the
    others. Where all notes are in one track, as of a piano, the melody is what is struck with no
    higher note sounding. A track named bridge is the bridge; the others are accompaniment, drums
    left out. Chords and tonic are estimated from all notes; no phrases are known. A file without a
    time signature is taken to be in 4/4.

    Args:
        path: A .mid or .midi file.
        accompanied: Whether there must be notes besides the melody.
    Raises:
        ImportError: symusic is not installed.
        ValueError: "file: reason", on one line; the file is missing, broken, empty, not in 4/4
            throughout, shorter than a bar, or has no melody or no accompaniment; or its tempo or
            a time in it is none (see `corpus.checked`).
    """
    path = Path(path)
    try:
        return _song(path, accompanied)
    except ValueError as error:
        raise ValueError(f"{checks.printable(path.name)}: {error}") from error


def read_folder(path: Path | str) -> tuple[list[Song], list[str]]:
    """Return the songs of all .mid and .midi files below a folder, by path, and skipped files.

    Returns:
        songs: Titled by their path in the folder.
        skipped: "file: reason" for each file of which `read` makes no song.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"folder {path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    songs, skipped = [], []
    for file in files:
        name = checks.printable(file.relative_to(path).as_posix())
        try:
            songs.append(replace(_song(file, accompanied=True), title=name))
        except ValueError as error:
            skipped.append(f"{name}: {error}")
    return songs, skipped


def write(
    path: Path | str,
    parts: dict[str, np.ndarray],
    onsets: dict[str, np.ndarray] | None = None,
    bpm: float = 90.0,
) -> None:
    """Write piano rolls as the tracks of a MIDI file in 4/4.

    Args:
        path: Where to.
        parts: {name of a track: notes that sound in it, bool [T, 128]}, a step a sixteenth.
        onsets: {name of a track: notes that begin, bool [T, 128]}; a held note begins anew.
            Otherwise notes that follow each other at one pitch are one note.
        bpm: Beats a minute, `corpus.SLOWEST` to FASTEST.
    Raises:
        ImportError: symusic is not installed.
        ValueError: a roll has another shape, or bpm is none that can be written.
    """
    symusic = need("symusic")
    checks.within("bpm", bpm, corpus.SLOWEST, corpus.FASTEST)
    onsets = onsets or {}
    score = symusic.Score(_TICKS)
    score.time_signatures.append(symusic.TimeSignature(0, BEATS, 4))
    score.tempos.append(symusic.Tempo(0, bpm))
    step = _TICKS // STEPS
    for name, roll in parts.items():
        track = symusic.Track(name, 0, False)
        for first, steps, pitch in _notes(name, roll, onsets.get(name)):
            track.notes.append(symusic.Note(first * step, steps * step, pitch, _VELOCITY))
        score.tracks.append(track)
    score.dump_midi(path)


def _song(path: Path, accompanied: bool) -> Song:
    # errors tell the reason, not the file
    score = _parse(path)
    for metre in score.time_signatures:
        if (metre.numerator, metre.denominator) != (BEATS, 4):
            verb = "changes to" if metre.time > 0 else "is"
            raise ValueError(f"metre {verb} {metre.numerator}/{metre.denominator}, expected 4/4")
    sounding = [track for track in score.tracks if not track.is_drum and len(track.notes)]
    if not sounding:
        raise ValueError("no notes besides drums" if score.note_num() else "no notes")
    tracks = [_quantise(track.notes.numpy(), score.ticks_per_quarter) for track in sounding]
    steps = max(int((track[:, 0] + track[:, 1]).max()) for track in tracks)
    if not BAR <= steps <= BAR * MOST_BARS:
        raise ValueError(f"length is {steps / BAR:.4g} bars, expected 1 to {MOST_BARS}")
    bpm = float(score.tempos[0].qpm) if len(score.tempos) else _BPM
    checks.within("tempo in beats a minute", bpm, corpus.SLOWEST, corpus.FASTEST)
    notes = _assign([track.name for track in sounding], tracks)
    if accompanied and (notes[:, 0] == MELODY).all():
        raise ValueError("no accompaniment, expected notes besides the melody")
    num_bars = -(-steps // BAR)
    chords, phrase = estimate_chords(notes, num_bars), np.full(num_bars, -1)
    return corpus.checked(
        Song(path.stem, notes, num_bars, *chords, phrase, estimate_key(notes), bpm)
    )


def _parse(path: Path) -> Score:
    score = need("symusic").Score
    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        parsed = score(path)
    except Exception as error:
        raise ValueError(f"broken, or not a MIDI file ({checks.reason(error)})") from error
    if parsed.ticks_per_quarter < 1:
        raise ValueError("broken (a beat has no ticks)")
    return parsed


def _quantise(notes: dict[str, np.ndarray], ticks_per_quarter: int) -> np.ndarray:
    # [N, 3]: first step, steps, pitch
    time, duration, pitch = (notes[k].astype(np.int64) for k in ("time", "duration", "pitch"))
    # times of 2^31 and more come out negative
    checks.within("time of a note in ticks", time, 0, 2**31 - 1)
    checks.within("duration of a note in ticks", duration, 0, 2**31 - 1)
    checks.within("pitch of a note", pitch, 0, PITCHES - 1)
    start, end = (np.rint(t * STEPS / ticks_per_quarter) for t in (time, time + duration))
    found = np.stack((start, np.maximum(end - start, 1), pitch), axis=1).astype(np.int64)
    return found[np.lexsort((pitch, start))]


def _assign(names: list[str], tracks: list[np.ndarray]) -> np.ndarray:
    # notes as in Song: tracks become melody, bridge and accompaniment
    notes = np.concatenate(tracks)
    if len(tracks) == 1 and not _is_one_voice(notes):
        roles = np.where(_is_on_top(notes), MELODY, ACCOMPANIMENT)
    else:
        role = [BRIDGE if "bridge" in name.lower() else ACCOMPANIMENT for name in names]
        role[_melody(names, tracks)] = MELODY
        roles = np.repeat(role, [len(track) for track in tracks])
    notes = np.insert(notes, 0, roles, axis=1)
    return notes[np.lexsort((notes[:, 3], notes[:, 0], notes[:, 1]))]


def _melody(names: list[str], tracks: list[np.ndarray]) -> int:
    for word in _SUNG:
        for i, name in enumerate(names):
            if word in name.lower():
                return i
    mean = [track[:, 2].mean() for track in tracks]
    middle = np.concatenate(tracks)[:, 2].mean()
    voices = [i for i, t in enumerate(tracks) if mean[i] >= middle and _is_one_voice(t)]
    if not voices:
        raise ValueError(
            f"no melody, expected one of its {len(tracks)} tracks to be named melody, vocal or "
            "lead, or to be a single voice above the rest"
        )
    most = max(len(tracks[i]) for i in voices)
    return max((i for i in voices if len(tracks[i]) >= _FULL * most), key=mean.__getitem__)


def _is_one_voice(track: np.ndarray) -> bool:
    start, steps = track[:, 0], track[:, 1]
    change = np.bincount(start, minlength=(start + steps).max() + 1)
    change -= np.bincount(start + steps, minlength=len(change))
    sounding = change.cumsum()
    return sounding.sum() <= _ONE_VOICE * (sounding > 0).sum()


def _is_on_top(track: np.ndarray) -> np.ndarray:
    # whether no note is higher where a note is struck
    sounding, _ = corpus.draw(track, (track[:, 0] + track[:, 1]).max())
    top = PITCHES - 1 - sounding[:, ::-1].argmax(1)
    return track[:, 2] == top[track[:, 0]]


def _notes(name: str, roll: np.ndarray, onset: np.ndarray | None) -> np.ndarray:
    # [N, 3]: first step, steps, pitch
    roll = np.asarray(roll, dtype=bool)
    onset = np.zeros_like(roll) if onset is None else np.asarray(onset, dtype=bool)
    if roll.ndim != 2 or roll.shape[1] != PITCHES or onset.shape != roll.shape:
        raise ValueError(
            f"parts and onsets must be [T, {PITCHES}], got {roll.shape} and {onset.shape} in {name}"
        )
    return corpus.notes_of(roll, onset)
