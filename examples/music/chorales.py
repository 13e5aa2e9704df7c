"""Bach's four-part chorales, as music21 brings them: melody, three parts below it, phrases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpe_lab import checks, corpus
from fastpe_lab.corpus import ACCOMPANIMENT, BAR, MELODY, STEPS, Song

from .harmony import estimate_chords, estimate_key
from .optional import need
from .split import split

if TYPE_CHECKING:
    from music21.stream import Part, Score

# beats a minute; the scores have none
BPM = 90.0
# labels of phrases count from here, as `corpus` takes the codes of capitals for small letters
_FIRST_LABEL = ord("a")


def load(cache: Path | None = None) -> list[Song]:
    """Return all chorales in 4/4; the soprano is the melody, the other parts accompany.

    The grid begins with a whole bar: a pickup stands at the end of bar 0. Repeats are not
    expanded. Phrases end at the fermatas of the soprano; a bar is of the phrase that has most of
    it, and phrases of one melody have one label. Chords are estimated from all parts. Of every ten
    tunes one is in "val" and one in "test"; what begins with the same six moves is one tune.
    The tonic is of two of these three, else the first: key in the score, last note of the bass,
    `estimate_key`.

    Args:
        cache: An .npz file; it is read if it is there, else written, as parsing takes a minute. One
            that is broken is written anew.
    Raises:
        ImportError: music21 is not installed.
        ValueError: music21 brings no score that can be read.
    """
    if cache is not None and Path(cache).is_file():
        try:
            return corpus.load(cache)
        except ValueError as error:
            print(f"skipped {error}; the chorales are parsed anew")
    songs = parse(paths())
    songs = split(songs, groups=[_tune(song) for song in songs])
    if cache is not None:
        cache = Path(cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all, if it is interrupted
        partial = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        corpus.save(songs, partial)
        partial.replace(cache)
    return songs


def paths() -> list[Path]:
    """Return the scores by Bach in music21's corpus, by name."""
    found = need("music21").corpus.getComposer("bach")
    # the .krn are there as .mxl too, the .rntxt are analyses
    return sorted(path for path in found if path.suffix in (".mxl", ".xml"))


def parse(scores: Sequence[Path]) -> list[Song]:
    """Return the songs of those scores that are chorales in 4/4, with a progress bar.

    A score that cannot be read is skipped with a line.
    """
    parser, tqdm = need("music21").converter, need("tqdm").tqdm
    songs = []
    for path in tqdm(scores, desc="chorales", unit="score"):
        try:
            song = _song(path.stem, parser.parse(path, forceSource=True, storePickle=False))
        except Exception as error:
            tqdm.write(f"skipped {checks.printable(path.name)}: {checks.reason(error)}")
            continue
        if song is not None:
            songs.append(song)
    return songs


def _song(title: str, score: Score) -> Song | None:
    parts = list(score.parts)
    if len(parts) != 4:
        return None
    meters = score.recurse().getElementsByClass("TimeSignature")
    bars = [
        (round(STEPS * m.offset), round(STEPS * m.duration.quarterLength))
        for m in parts[0].getElementsByClass("Measure")
    ]
    if {meter.ratioString for meter in meters} != {"4/4"} or not bars:
        return None
    shift = -bars[0][1] % BAR
    if any((start + shift) % BAR for start, steps in bars if steps == BAR):
        # bars are left out somewhere, or of another length
        return None
    voices = [_notes(part, shift) for part in parts]
    soprano, *others = (np.array([n[:3] for n in voice]).reshape(-1, 3) for voice in voices)
    tracks = ((MELODY, soprano), *((ACCOMPANIMENT, other) for other in others))
    notes = np.concatenate([np.insert(voice, 0, track, axis=1) for track, voice in tracks])
    notes = notes[np.lexsort((notes[:, 3], notes[:, 0], notes[:, 1]))]
    end = notes[:, 1] + notes[:, 2]
    num_bars = -(-int(end.max()) // BAR)
    checks.within("number of bars", num_bars, 1, corpus.MOST_BARS)
    # signatures of modes mislead, and so do half closes: two of three are believed
    tonics = [key.tonic.pitchClass for key in parts[0].recurse().getElementsByClass("Key")][:1]
    tonics += [estimate_key(notes), int(notes[end == end.max(), 3].min()) % 12]
    ends = [step + steps for step, steps, _, fermata in voices[0] if fermata]
    chords, phrases = estimate_chords(notes, num_bars), _phrases(soprano, ends, num_bars)
    tonic = max(tonics, key=tonics.count)
    return corpus.checked(Song(title, notes, num_bars, *chords, phrases, tonic, BPM))


def _notes(part: Part, shift: int) -> list[list[int]]:
    # [first step, steps, pitch, has a fermata] of each note, ties joined
    notes: list[list[int]] = []
    for element in part.flatten().notes:
        start = round(STEPS * element.offset) + shift
        end = round(STEPS * (element.offset + element.quarterLength)) + shift
        fermata = any("Fermata" in e.classes for e in element.expressions)
        tied = element.tie is not None and element.tie.type != "start"
        for pitch in element.pitches if end > start else ():
            held = [n for n in notes[-4:] if tied and n[2] == pitch.midi and sum(n[:2]) == start]
            if held:
                held[0][1] += end - start
                held[0][3] |= fermata
            else:
                notes.append([start, end - start, pitch.midi, fermata])
    return notes


def _phrases(soprano: np.ndarray, ends: list[int], num_bars: int) -> np.ndarray:
    # label of each bar; soprano [N, 3]: first step, steps, pitch
    if not ends:
        return np.full(num_bars, -1)
    of_note = np.searchsorted(ends, soprano[:, 0], side="right")
    melodies = []
    for phrase in range(len(ends) + 1):
        inside = soprano[of_note == phrase]
        melodies.append(tuple((start - inside[0, 0], pitch) for start, _, pitch in inside))
    labels = corpus.by_first_appearance(melodies)
    of_step = np.searchsorted(ends, np.arange(num_bars * BAR), side="right").reshape(-1, BAR)
    # what stands behind the last fermata is of its phrase
    of_step = np.minimum(of_step, of_note.max())
    return np.array([_FIRST_LABEL + labels[np.bincount(bar).argmax()] for bar in of_step])


def _tune(song: Song) -> tuple[int, ...]:
    # the first moves of the melody
    pitch = song.notes[song.notes[:, 0] == MELODY, 3]
    moves = np.diff(pitch)
    return tuple(moves[moves != 0][:6].tolist())
