"""Pictures of music: piano rolls under the chords and the phrases."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation, Transform, blended_transform_factory

from fastpe_lab.corpus import BAR, PITCHES, STEPS, Song, notes_of, runs

from .chords import chord_name

# hues of equal lightness in the order of fifths from F: near keys have near hues
_FIFTHS = (
    *("#3f7fe0", "#6a5be8", "#a24ae0", "#d13fc0", "#e5407f", "#e85a4a"),
    *("#e07b1e", "#c2960f", "#86a516", "#3fa94a", "#14a58c", "#1698c2"),
)
_COLORS = np.array([to_rgb(_FIFTHS[(7 * p + 1) % 12]) for p in range(12)])
_BLACK = (1, 3, 6, 8, 10)
# a system is a line of bars as in a score; sizes in inches
_SYSTEM_BARS = 16
_BAR_WIDTH, _LEFT, _RIGHT = 0.85, 1.3, 0.15
_LANE, _GAP, _BETWEEN, _TITLE = 0.22, 0.06, 0.45, 0.45
_SEMITONE, _LEAST_ROLL = 0.042, 0.75


def piano_rolls(
    song: Song, rolls: dict[str, np.ndarray], path: Path | str, title: str = ""
) -> None:
    """Draw piano rolls below one another, under the song's phrases and chords, as a PNG.

    Bars stand in systems of 16 at the most. Notes and chords are coloured by pitch class (of the
    root), neighbours in fifths alike; the octaves' C are marked at the left.

    Args:
        song: Whose bars, chords and phrases are shown; lanes without a label are left out.
        rolls: {name: notes that sound, bool [song.num_steps, 128]}, from top to bottom.
        path: file for the picture.
        title: Above it, default the song's.
    Raises:
        ValueError: there is no roll, or one is not as above.
    """
    if not rolls:
        raise ValueError("rolls must have at least one roll, got none")
    for name, roll in rolls.items():
        roll = np.asarray(roll)
        if roll.shape != (song.num_steps, PITCHES) or roll.dtype != bool:
            raise ValueError(
                f"rolls[{name!r}] must be bool [{song.num_steps}, {PITCHES}], "
                f"got {roll.dtype} {list(roll.shape)}"
            )
    systems = math.ceil(song.num_bars / _SYSTEM_BARS)
    bars = math.ceil(song.num_bars / systems)
    rows = [(_draw_phrases, _LANE)] if (song.phrase >= 0).any() else []
    rows += [(_draw_chords, _LANE)] if (song.root >= 0).any() else []
    rows += [_row_of(name, np.asarray(roll)) for name, roll in rolls.items()]
    height = sum(size + _GAP for _, size in rows) + _BETWEEN
    page = _Page(bars, _TITLE + systems * height)
    # a title of a file may hold anything, and is no formula
    above = {"ha": "center", "va": "center", "parse_math": False}
    page.figure.text(0.5, 1 - 0.22 / page.height, title or song.title, **above)
    for system in range(systems):
        first = system * bars
        part = song.cut(first, min(bars, song.num_bars - first))
        for i, (draw, size) in enumerate(rows):
            draw(page.axis(size), part, first)
            page.skip(_BETWEEN if i == len(rows) - 1 else _GAP)
            if i == len(rows) - 1:
                _number_bars(page.figure.axes[-1], part, first)
    page.figure.savefig(path, dpi=110)


class _Page:
    """A figure that is filled from top to bottom."""

    def __init__(self, bars: int, height: float) -> None:
        # a lone bar is drawn wider, for the title above it
        self.inside = max(bars * _BAR_WIDTH, 4.0)
        self.bars, self.height, self.cursor = bars, height, height - _TITLE
        self.figure = Figure(figsize=(_LEFT + self.inside + _RIGHT, height))

    def axis(self, size: float) -> Axes:
        """Return the next axes, `size` inches high, a unit in x a sixteenth."""
        width = _LEFT + self.inside + _RIGHT
        self.skip(size)
        box = (_LEFT / width, self.cursor / self.height)
        axis = self.figure.add_axes((*box, self.inside / width, size / self.height))
        axis.set(xlim=(0, self.bars * BAR), xticks=[], yticks=[])
        return axis

    def skip(self, size: float) -> None:
        """Move down."""
        self.cursor -= size


def _row_of(name: str, roll: np.ndarray) -> tuple[Callable[[Axes, Song, int], None], float]:
    """Return a function that draws a part of a roll, and its height: the pitches of all of it."""
    used = np.flatnonzero(roll.any(0))
    low, high = (used[0] - 2, used[-1] + 3) if len(used) else (54, 68)
    size = max((high - low) * _SEMITONE, _LEAST_ROLL)

    def draw(axis: Axes, part: Song, first: int) -> None:
        steps = roll[first * BAR : first * BAR + part.num_steps]
        _draw_roll(axis, steps, low, high)
        axis.text(-0.4, 0.5, name, transform=_inches(axis), ha="right", va="center", fontsize=9)

    return draw, size


def _draw_roll(axis: Axes, roll: np.ndarray, low: int, high: int) -> None:
    end = len(roll)
    rows = [_box(0, end, p - 0.5, p + 0.5) for p in range(low, high) if p % 12 in _BLACK]
    axis.add_collection(PolyCollection(rows, facecolors="#f1f2f4", zorder=0))
    axis.vlines(range(0, end, STEPS), low, high, colors="#e3e5e9", linewidth=0.5, zorder=1)
    axis.vlines(range(0, end + 1, BAR), low, high, colors="#8d939c", linewidth=0.9, zorder=2)
    octaves = [p for p in range(low, high) if p % 12 == 0]
    axis.hlines([p - 0.5 for p in octaves], 0, end, colors="#c3c7cd", linewidth=0.6, zorder=1)
    found = notes_of(roll)
    # a little short; what is struck again at once is one with what came before, as rolls have it
    notes = [_box(a, a + steps - 0.12, p - 0.5, p + 0.5) for a, steps, p in found]
    axis.add_collection(PolyCollection(notes, facecolors=_COLORS[found[:, 2] % 12], zorder=3))
    axis.set_ylim(low - 0.5, high - 0.5)
    axis.set_yticks(octaves, [f"C{p // 12 - 1}" for p in octaves], fontsize=7, color="#5b616b")
    axis.tick_params(length=0, pad=2)
    axis.spines[:].set_visible(False)


def _draw_chords(axis: Axes, part: Song, first: int) -> None:
    for a, b in runs(np.column_stack((part.root, part.chroma))):
        root = int(part.root[a])
        color = _pale(_COLORS[root]) if root >= 0 else (0.95, 0.95, 0.95)
        _label(axis, a * STEPS, b * STEPS, chord_name(root, part.chroma[a]), color)
    _name_lane(axis, "chords")


def _draw_phrases(axis: Axes, part: Song, first: int) -> None:
    for a, b in runs(part.phrase):
        label = int(part.phrase[a])
        if label >= 0:
            # hues by the golden ratio: any two letters differ
            color = colorsys.hsv_to_rgb(0.618034 * label % 1, 0.28, 0.93)
            name = chr(label).upper() if ord("a") <= label <= ord("z") else str(label)
            _label(axis, a * BAR, b * BAR, name, color)
    _name_lane(axis, "phrases")


def _label(axis: Axes, start: int, stop: int, text: str, color: tuple[float, ...]) -> None:
    box = _box(start, stop, 0, 1)
    axis.add_collection(PolyCollection([box], facecolors=[color], edgecolors="white"))
    width, points = axis.get_figure().get_size_inches()[0] * axis.get_position().width, 72
    room = (stop - start) / axis.get_xlim()[1] * width * points - 2
    # a letter is about 0.62 of its size wide
    size = min(9.0, room / (0.62 * len(text)))
    if size >= 3.5:
        middle = (start + stop) / 2
        axis.text(middle, 0.47, text, ha="center", va="center", fontsize=size, color="#22262c")


def _name_lane(axis: Axes, name: str) -> None:
    axis.set_ylim(0, 1)
    axis.spines[:].set_visible(False)
    axis.text(-0.4, 0.5, name, transform=_inches(axis), ha="right", va="center", fontsize=8)


def _number_bars(axis: Axes, part: Song, first: int) -> None:
    starts = range(0, part.num_steps, BAR)
    axis.set_xticks(starts, [str(first + 1 + i) for i in range(part.num_bars)], fontsize=7)


def _inches(axis: Axes) -> Transform:
    """Return the transform of x in inches from the axis' left edge, y in parts of its height."""
    figure = axis.get_figure()
    edge = ScaledTranslation(axis.get_position().x0, 0, figure.transFigure)
    return blended_transform_factory(figure.dpi_scale_trans + edge, axis.transAxes)


def _pale(color: np.ndarray) -> tuple[float, ...]:
    return tuple(1 - 0.38 * (1 - color))


def _box(left: float, right: float, bottom: float, top: float) -> list[tuple[float, float]]:
    return [(left, bottom), (left, top), (right, top), (right, bottom)]
