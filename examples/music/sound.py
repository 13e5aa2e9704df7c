"""Sound of a score, its band energies, and residual k-means of them: tokens without a codec.

The quantiser is residual k-means on band energies, not a neural codec: it throws phases away, so
its tokens cannot be played. It has what matters here of one: several codebooks, each of what the
ones before it left over, at a fixed number of frames a second.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16000
_PARTIALS, _RELEASE = 6, 0.05
_WINDOW, _BANDS, _LOWEST, _OCTAVES = 2048, 48, 100.0, 6
# of the loudest frame's energy, below which all is silence
_FLOOR = 1e-6


def notes_of(roll: np.ndarray, onset: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (first step, end, pitch) for notes that sound and that begin, bool [T, 128] each.

    A note ends where its pitch falls silent or is struck again.
    """
    sounds = np.pad(roll, ((0, 1), (0, 0)))
    notes = []
    for start, pitch in np.argwhere(onset & roll):
        end = start + 1
        while sounds[end, pitch] and not onset[end, pitch]:
            end += 1
        notes.append((int(start), int(end), int(pitch)))
    return notes


def render(notes: list[tuple[int, int, int]], num_steps: int, step: float) -> np.ndarray:
    """Return the sound of notes, float64 [samples] within -1..1, by adding decaying partials.

    Args:
        notes: (first step, end, MIDI pitch).
        num_steps: Length; notes that go on are cut off.
        step: Seconds a step.
    """
    out = np.zeros(round(num_steps * step * SAMPLE_RATE))
    for start, end, pitch in notes:
        first, stop = (min(round(i * step * SAMPLE_RATE), len(out)) for i in (start, end))
        time = np.arange(stop - first) / SAMPLE_RATE
        partial = np.arange(1, _PARTIALS + 1)[:, None]
        frequency = partial * 440 * 2 ** ((pitch - 69) / 12)
        # higher partials are weaker and die sooner; none beyond half the sample rate
        level = (frequency < SAMPLE_RATE / 2) / partial * np.exp(-1.5 * partial * time)
        tone = (level * np.sin(2 * np.pi * frequency * time)).sum(0)
        out[first:stop] += tone * np.minimum(1, (time[::-1] + 1 / SAMPLE_RATE) / _RELEASE)
    return out / max(np.abs(out).max(), 1e-12)


def save_wav(path: Path, sound: np.ndarray) -> None:
    """Write sound within -1..1 as 16 bit, one channel."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(sound), "NONE", ""))
        file.writeframes((32767 * sound).astype("<i2").tobytes())


def band_energies(sound: np.ndarray, frame_rate: int) -> np.ndarray:
    """Return log energies in 48 bands, 8 an octave from 100 Hz, float64 [T, 48].

    Args:
        sound: Samples at SAMPLE_RATE; T is the number of whole frames.
        frame_rate: Frames a second, a divisor of SAMPLE_RATE. A frame is seen through a window of
            0.128 s around its centre.
    Raises:
        ValueError: frame_rate is no such divisor.
    """
    if frame_rate < 1 or SAMPLE_RATE % frame_rate:
        raise ValueError(f"frame_rate must divide {SAMPLE_RATE}, got {frame_rate}")
    hop = SAMPLE_RATE // frame_rate
    before = _WINDOW // 2 - hop // 2
    padded = np.pad(sound, (before, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::hop][: len(sound) // hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=1)) ** 2
    pitch = np.log2(np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)[1:] / _LOWEST)
    centres = np.arange(_BANDS) * _OCTAVES / _BANDS
    triangles = np.maximum(0, 1 - np.abs(pitch[:, None] - centres) * _BANDS / _OCTAVES)
    energy = power[:, 1:] @ triangles
    return np.log(energy + _FLOOR * max(energy.sum(1).max(), 1e-12))


class ResidualKMeans:
    """Codebooks, each learned by k-means on the residual of those before.

    Args:
        frames: To learn from, [N, F], N at least `size`.
        num_codebooks: How many.
        size: Entries of each.
        seed: seed for the first entries, which are random frames.
        rounds: number of rounds of Lloyd's algorithm.
    Raises:
        ValueError: there are fewer frames than entries.
    """

    def __init__(
        self, frames: np.ndarray, num_codebooks: int, size: int, seed: int = 0, rounds: int = 15
    ) -> None:
        if len(frames) < size:
            raise ValueError(f"frames must be at least size = {size}, got {len(frames)}")
        generator = np.random.default_rng(seed)
        self.mean, self.codebooks = frames.mean(0), []
        rest = frames - self.mean
        for _ in range(num_codebooks):
            book = rest[generator.choice(len(rest), size, replace=False)]
            for _ in range(rounds):
                nearest = _nearest(rest, book)
                members = np.eye(size)[nearest]  # [N, size]
                count = members.sum(0)[:, None]
                # an entry that is nobody's nearest stays where it is
                book = np.where(count > 0, members.T @ rest / np.maximum(count, 1), book)
            self.codebooks.append(book)
            rest = rest - book[_nearest(rest, book)]

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Return tokens int64 [N, num_codebooks] of frames [N, F]."""
        rest, ids = frames - self.mean, []
        for book in self.codebooks:
            ids.append(_nearest(rest, book))
            rest = rest - book[ids[-1]]
        return np.stack(ids, axis=1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Return frames [N, F] of tokens [N, up to num_codebooks], of the first codebooks."""
        parts = (book[column] for book, column in zip(self.codebooks, ids.T, strict=False))
        return self.mean + sum(parts)


def _nearest(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    return (np.square(book).sum(1) - 2 * x @ book.T).argmin(1)
