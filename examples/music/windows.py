"""Songs cut into windows of bars: inputs, targets and positions of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastpe_lab.corpus import ACCOMPANIMENT, BAR, MELODY, PRIORS, Song

# the keys of a piano
LOWEST, KEYS = 21, 88
CHROMA = 12


@dataclass(frozen=True)
class Window:
    """Some bars of a song, or a batch of them (then B stands in front of every shape).

    Args:
        inputs: float [T, C]: keys that sound, keys that are struck, and maybe chords (12).
        target: float [T, 2, 88]: the keys that sound, and of these the keys that are struck.
        positions: float64 [T, L], by the priors.
    """

    inputs: Tensor
    target: Tensor
    positions: Tensor


def input_size(chords: bool) -> int:
    """Return C, the channels of a window's inputs."""
    return 2 * KEYS + CHROMA * chords


def num_levels(priors: str) -> int:
    """Return L of priors joined by +, such as "time+bin"."""
    return len(structural_levels(priors))


def structural_levels(priors: str) -> list[bool]:
    """Return for each component of a position whether it is a label, rather than time."""
    return [
        prior != "time" for prior in split(priors) for _ in range(CHROMA if prior == "bin" else 1)
    ]


def split(priors: str) -> list[str]:
    """Return the priors that are joined by +.

    Raises:
        ValueError: one is not known.
    """
    names = priors.split("+")
    for name in names:
        if name not in PRIORS:
            raise ValueError(f"prior must be of {', '.join(PRIORS)}, joined by +, got {name!r}")
    return names


def positions_of(song: Song, priors: str) -> np.ndarray:
    """Return the positions of a song's steps, float64 [T, L]."""
    parts = [song.positions(prior).reshape(song.num_steps, -1) for prior in split(priors)]
    return np.concatenate(parts, axis=1).astype(np.float64)


class Windows:
    """Windows of songs for a task.

    In the task "harmonize" the model hears the melody up to a step and is to say the accompaniment
    at it; in "next" it hears all that sounded before a step and is to say what sounds at it.

    Args:
        songs: songs to take windows from; songs shorter than a window are passed over.
        task: "harmonize" or "next".
        priors: priors of the positions, joined by +.
        chords: Give the chords' pitch classes as inputs too.
        labels: "own", or "another": positions are those of another song. What remains of an
            encoding's advantage then is not the music's structure.
    """

    def __init__(
        self,
        songs: list[Song],
        task: str,
        priors: str,
        *,
        chords: bool = False,
        labels: str = "own",
    ) -> None:
        if task not in ("harmonize", "next"):
            raise ValueError(f"task must be 'harmonize' or 'next', got {task!r}")
        if labels not in ("own", "another"):
            raise ValueError(f"labels must be 'own' or 'another', got {labels!r}")
        if labels == "another" and len(songs) < 2:
            raise ValueError(f"labels of another song need two songs, got {len(songs)}")
        if "phrase" in split(priors) and not any((song.phrase >= 0).any() for song in songs):
            raise ValueError("prior must not be phrase for songs whose phrases are not known")
        self.songs, self.task, self.priors = songs, task, priors
        self.chords, self.labels = chords, labels
        self._rolls = [_rolls(song, task) for song in songs]

    def starts(self, bars: int) -> list[tuple[int, int]]:
        """Return (song, first bar) of windows side by side in every song that is long enough."""
        return [
            (i, first)
            for i, song in enumerate(self.songs)
            for first in range(0, song.num_bars - bars + 1, bars)
        ]

    def window(self, i: int, first: int, bars: int) -> Window:
        """Return bars `first` to `first + bars` of song i."""
        heard, target = (roll[first * BAR : (first + bars) * BAR] for roll in self._rolls[i])
        if self.task == "next":
            # a step knows the notes before it; the first step knows none
            heard = np.concatenate((np.zeros_like(heard[:1]), heard[:-1]))
        inputs = heard.reshape(len(heard), -1)
        cut = self.songs[i].cut(first, bars)
        if self.chords:
            inputs = np.concatenate((inputs, cut.positions("bin").astype(bool)), axis=1)
        where = self._other(i, first, bars) if self.labels == "another" else cut
        return Window(
            torch.from_numpy(inputs).float(),
            torch.from_numpy(target).float(),
            torch.from_numpy(positions_of(where, self.priors)),
        )

    def _other(self, i: int, first: int, bars: int) -> Song:
        # the next song that has as many bars; its first ones if it ends before
        for step in range(1, len(self.songs)):
            song = self.songs[(i + step) % len(self.songs)]
            if song.num_bars >= bars:
                return song.cut(first if first + bars <= song.num_bars else 0, bars)
        raise ValueError(f"labels need another song of {bars} bars, and there is none")

    def random(self, count: int, bars: int, generator: np.random.Generator) -> Window:
        """Return a batch of `count` windows, each at a random bar of a random song.

        Raises:
            ValueError: no song has as many bars.
        """
        long = [i for i, song in enumerate(self.songs) if song.num_bars >= bars]
        if not long:
            raise ValueError(f"a song of at least {bars} bars is needed, and there is none")
        chosen = []
        for i in generator.choice(long, count):
            first = generator.integers(self.songs[i].num_bars - bars + 1)
            chosen.append(self.window(int(i), int(first), bars))
        return batched(chosen)


def batched(windows: list[Window]) -> Window:
    """Return windows of one length as a batch."""
    fields = ("inputs", "target", "positions")
    return Window(*(torch.stack([getattr(w, field) for w in windows]) for field in fields))


def _rolls(song: Song, task: str) -> tuple[np.ndarray, np.ndarray]:
    # the input and the target, bool [T, 2, 88]
    def both(*tracks: int) -> np.ndarray:
        return np.stack(song.rolls(*tracks), axis=1)[:, :, LOWEST : LOWEST + KEYS]

    if task == "next":
        everything = both()
        return everything, everything
    return both(MELODY), both(ACCOMPANIMENT)
