"""Tokens of an audio codec, and structure labelled in seconds brought to their frame rate.

Time is exact: seconds and frames a second are fractions, so no boundary moves by a frame however
long the piece. A float is read as the nearest fraction with a denominator of at most 10^6, which
for two hours is the one that was meant: 0.1 is 1/10, 5 / 6 is 5/6.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastpe_lab import checks
from fastpe_lab.corpus import by_first_appearance

_LARGEST_DENOMINATOR = 10**6
# tokens of a codebook: larger numbers are no tokens, and a model has a row for each token
MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Tokens:
    """Tokens of a piece of audio.

    Args:
        ids: int64 [T, num_codebooks], 0 to 2^20 - 1.
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
    name = checks.printable(path)
    if not path.is_file():
        raise ValueError(f"tokens file {name} does not exist")
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"tokens file must end in .npy or .pt, got {checks.printable(path.name)}")
    ids = _read_npy(path, name) if path.suffix == ".npy" else _read_pt(path, name)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"tokens of {name} must be integers [T, num_codebooks], got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if not ids.size:
        raise ValueError(f"tokens of {name} must not be empty, got {list(ids.shape)}")
    checks.within(f"tokens of {name}", ids, 0, MOST_TOKENS - 1)
    return Tokens(ids.astype(np.int64), rate)


def load_labels(path: Path | str) -> list[Label]:
    """Return the labels of a .json file, a list of {"start": s, "end": s, "label": x}.

    Raises:
        ValueError: there is no such file, or it is not in this format.
    """
    path = Path(path)
    name = checks.printable(path)
    if not path.is_file():
        raise ValueError(f"labels file {name} does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        checks.typed("labels", rows, list)
        labels = [_label(row, f"[{i}]") for i, row in enumerate(rows)]
        if labels:
            _spans(labels)
            _table(labels)
    except (ValueError, RecursionError) as error:
        why = checks.printable(error)
        raise ValueError(f"{name} is not in the expected format: {why}") from error
    return labels


def _label(row: object, name: str) -> Label:
    kinds = {"start": (int, float), "end": (int, float), "label": (str, int, float, list)}
    found = checks.record(row, kinds, name)
    return Label(found["start"], found["end"], found["label"])


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
    spans = _spans(labels)
    out = np.full(num_frames, -1, dtype=np.int64)
    for start, end, i in spans:
        # the first frame whose centre is not before a time
        first, stop = (
            min(max(math.ceil(time * rate - Fraction(1, 2)), 0), num_frames)
            for time in (start, end)
        )
        out[first:stop] = i
    return out


def _spans(labels: Sequence[Label]) -> list[tuple[Fraction, Fraction, int]]:
    # start, end and number of each label, in the order of their starts
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
    return spans


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
    table = _table(labels)
    if table is None:
        return by_first_appearance(labels[i][2] if i >= 0 else None for i in which)
    gap = np.full_like(table[:1], -1 if table.ndim == 1 else 0)
    return np.concatenate((table, gap))[which]


def _table(labels: Sequence[Label]) -> np.ndarray | None:
    # the numbers or vectors that labels are, [N] or [N, L]; None if they are names
    values = [label[2] for label in labels]
    if all(isinstance(value, str) for value in values):
        return None
    try:
        table = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        table = np.empty(0)
    strings = any(isinstance(value, str) for value in values)
    if strings or table.ndim not in (1, 2) or not table.size or not np.isfinite(table).all():
        raise ValueError(
            "labels must all be names, or all finite numbers, or all vectors of one size of these"
        )
    return table


def _frame_rate(value: float | Rational) -> Fraction:
    rate = _fraction("frame_rate", value)
    if rate <= 0:
        raise ValueError(f"frame_rate must be positive, got {value!r}")
    return rate


def _fraction(name: str, value: float | Rational) -> Fraction:
    if isinstance(value, Rational) and not isinstance(value, bool):
        return Fraction(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return Fraction(float(value)).limit_denominator(_LARGEST_DENOMINATOR)


def _read_npy(path: Path, name: str) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:
        raise ValueError(f"{name} is not an .npy file: {checks.reason(error)}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{name} must hold an array, got {type(found).__name__}")
    return found


def _read_pt(path: Path, name: str) -> np.ndarray:
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{name} is not a .pt file of a tensor: {checks.reason(error)}") from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name} must hold a tensor, got {type(found).__name__}")
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise ValueError(f"tokens of {name} must be integers, got {found.dtype}")
    if found.is_quantized or found.layout != torch.strided or found.device.type != "cpu":
        raise ValueError(
            f"{name} must hold a dense tensor, got {found.layout} on {found.device.type}"
        )
    return found.numpy()
