"""Tokens of an audio codec, and structure labelled in seconds brought to their frame rate.

Time is exact: seconds and frames a second are fractions, so no boundary moves by a frame however
long the piece. A float is read as the nearest fraction with a denominator of at most 10^6, which
for two hours is the one that was meant: 0.1 is 1/10, 5 / 6 is 5/6.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from corpus import by_first_appearance

_LARGEST_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Tokens:
    """Tokens of a piece of audio.

    Args:
        ids: int64 [T, num_codebooks], not negative.
        frame_rate: Frames a second; frame i covers i / frame_rate to (i + 1) / frame_rate seconds.
    """

    ids: np.ndarray
    frame_rate: Fraction


class Label(NamedTuple):
    """What holds from a start to an end, in seconds: a name, a number, or a vector of numbers."""

    start: float | Rational
    end: float | Rational
    label: str | float | Sequence[float]


def load_tokens(path: Path | str, frame_rate: float | Rational) -> Tokens:
    """Return the tokens of a file.

    Args:
        path: .npy, or .pt with a tensor (no other objects are loaded): integers [T, num_codebooks].
        frame_rate: Frames a second.
    Raises:
        ValueError: there is no such file, or an argument or the content is not as above.
    """
    path = Path(path)
    rate = _frame_rate(frame_rate)
    if not path.is_file():
        raise ValueError(f"tokens file {path} does not exist")
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"tokens file must end in .npy or .pt, got {path.name}")
    ids = _read_npy(path) if path.suffix == ".npy" else _read_pt(path)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"tokens of {path} must be integers [T, num_codebooks], got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if not ids.size:
        raise ValueError(f"tokens of {path} must not be empty, got {list(ids.shape)}")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int64).max:
        raise ValueError(f"tokens of {path} must be 0 to 2^63 - 1, got {ids.min()} to {ids.max()}")
    return Tokens(ids.astype(np.int64), rate)


def load_labels(path: Path | str) -> list[Label]:
    """Return the labels of a .json file, a list of {"start": s, "end": s, "label": x}.

    Raises:
        ValueError: there is no such file, or it is not in this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"labels file {path} does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Label(row["start"], row["end"], row["label"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the expected format: {error!r}") from error


def labels_at_frames(
    labels: Sequence[Label], num_frames: int, frame_rate: float | Rational
) -> np.ndarray:
    """Return which label holds at the centre of each frame, -1 for none, int64 [num_frames].

    The centre of frame i is at (i + 1/2) / frame_rate seconds. A label holds from its start to just
    before its end: a centre on a boundary is the later label's. What lies outside the frames is cut
    off, and a label between two centres is at no frame.

    Args:
        labels: In any order; they may leave gaps, but not overlap.
        num_frames: T.
        frame_rate: Frames a second.
    Raises:
        ValueError: labels overlap, or end where they start or before, or an argument is no such
            number.
    """
    rate = _frame_rate(frame_rate)
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 0:
        raise ValueError(f"num_frames must be an int of at least 0, got {num_frames!r}")
    spans = []
    for i, label in enumerate(labels):
        start = _fraction(f"start of label {i}", label[0])
        end = _fraction(f"end of label {i}", label[1])
        if start >= end:
            raise ValueError(f"label {i} must end after its start {label[0]}, got {label[1]}")
        spans.append((start, end, i))
    spans.sort()
    for (_, end, i), (start, _, j) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"labels must not overlap, got label {i} until {labels[i][1]} and label {j} from "
                f"{labels[j][0]}"
            )
    out = np.full(num_frames, -1, dtype=np.int64)
    for start, end, i in spans:
        # the first frame whose centre is not before a time
        first, stop = (
            min(max(math.ceil(time * rate - Fraction(1, 2)), 0), num_frames)
            for time in (start, end)
        )
        out[first:stop] = i
    return out


def positions_at_frames(
    labels: Sequence[Label], num_frames: int, frame_rate: float | Rational
) -> np.ndarray:
    """Return structural positions of frames, for `fastpe`'s encodings.

    Args:
        labels: As in `labels_at_frames`, all of one kind.
        num_frames: T.
        frame_rate: Frames a second.
    Returns:
        Of names: numbers by first appearance, "none" in gaps one of them, int64 [T]. Of numbers:
        these, -1 in gaps, float64 [T]. Of vectors: these, zeros in gaps, float64 [T, L].
    Raises:
        ValueError: as `labels_at_frames`; or there is no label, or they are not of one kind.
    """
    which = labels_at_frames(labels, num_frames, frame_rate)
    if not labels:
        raise ValueError("labels must have at least one label, got none")
    values = [label[2] for label in labels]
    if all(isinstance(value, str) for value in values):
        return by_first_appearance(values[i] if i >= 0 else None for i in which)
    try:
        table = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    strings = any(isinstance(value, str) for value in values)
    if strings or table.ndim not in (1, 2) or not table.size or not np.isfinite(table).all():
        raise ValueError(
            "labels must all be names, or all finite numbers, or all vectors of one size of these"
        )
    gap = np.full_like(table[:1], -1 if table.ndim == 1 else 0)
    return np.concatenate((table, gap))[which]


def _frame_rate(value: float | Rational) -> Fraction:
    rate = _fraction("frame_rate", value)
    if rate <= 0:
        raise ValueError(f"frame_rate must be positive, got {value!r}")
    return rate


def _fraction(name: str, value: float | Rational) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if isinstance(value, Rational):
        return Fraction(value)
    return Fraction(float(value)).limit_denominator(_LARGEST_DENOMINATOR)


def _read_npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an .npy file: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} must hold an array, got {type(found).__name__}")
    return found


def _read_pt(path: Path) -> np.ndarray:
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a .pt file of a tensor: {error}") from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{path} must hold a tensor, got {type(found).__name__}")
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise ValueError(f"tokens of {path} must be integers, got {found.dtype}")
    return found.numpy()
