"""Checks of the fields in files. Each error is one line: the field, the expected and the found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def printable(text: object) -> str:
    """Return a name on one line, with escapes for characters that a terminal cannot show.

    Names of files and songs may hold line breaks, and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def reason(error: Exception) -> str:
    """Return on one line why another package failed to read a file."""
    # torch and NumPy go on to advise reading the file without their checks
    first = next(iter(str(error).strip().splitlines()), "")
    return printable(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def within(name: str, value: object, low: float, high: float) -> None:
    """Raise a ValueError unless a number, or a whole array, is in `low` to `high`; NaN is not."""
    values = np.asarray(value)
    bad = values[~((values >= low) & (values <= high))]
    if bad.size:
        raise ValueError(f"{name} must be {low} to {high}, got {bad.flat[0]}")


def array(name: str, value: object, shape: tuple[int | None, ...], kinds: str) -> np.ndarray:
    """Return an array with a shape and one of these kinds of dtype, or raise a ValueError.

    Args:
        name: name of the field.
        value: the value that was read.
        shape: expected shape, with None for any size.
        kinds: values of `numpy.dtype.kind`: "i" and "u" integers, "f" floats, "b" bool, "U" text.
    """
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else None
    fits = found and value.dtype.kind in kinds and len(value.shape) == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        words = {"i": "integers", "f": "numbers", "b": "bool", "U": "text"}
        of = words["f" if "f" in kinds else kinds[0]]
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be {of} [{sizes}], got {found or type(value).__name__}")
    return value


def typed(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raise a ValueError unless a value has a type; bool and NaN do not count as numbers."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{name} must be {wanted}, got {printable(repr(value))[:80]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be of 64 bits, got {str(value)[:20]}...")


def record(value: object, kinds: Mapping[str, type | tuple[type, ...]], of: str = "") -> dict:
    """Return a record, or raise a ValueError unless it is a dict with these fields.

    Args:
        value: the value that was read.
        kinds: {required field: its type}.
        of: name of the field that holds the record, if any.
    """
    typed(of or "a record", value, dict)
    for name, kind in kinds.items():
        shown = f"{of}.{name}" if of else name
        if name not in value:
            found = printable(", ".join(map(str, value)))[:80]
            raise ValueError(f"{shown} must be there, got {found or 'nothing'}")
        typed(shown, value[name], kind)
    return value


def made(kind: type[T], value: object, of: str) -> T:
    """Return a dataclass made from its fields, which must have the types of its defaults.

    Args:
        kind: the dataclass.
        value: a dict, as `dataclasses.asdict` returns it.
        of: name of the field that holds the dict.
    """
    kinds = {f.name: type(f.default) for f in dataclasses.fields(kind)}
    record(value, {n: (int, float) if k is float else k for n, k in kinds.items()}, of)
    if unknown := value.keys() - kinds.keys():
        further = printable(", ".join(sorted(map(str, unknown))))
        raise ValueError(f"{of} must have no further fields, got {further}")
    return kind(**value)


def json_lines(path: Path, check: Callable[[dict], object]) -> tuple[list[dict], list[str]]:
    """Return the records of a file of JSON lines, and the reasons for skipped lines.

    Args:
        path: the file.
        check: function that raises a ValueError for an unusable record.
    Returns:
        records: the usable records.
        skipped: "file, line: reason" for each other line, such as one that was cut off.
    """
    records, skipped = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode())
            check(found)
            records.append(found)
        except (ValueError, RecursionError) as error:
            skipped.append(f"{printable(path)}, line {number}: {printable(error)}")
    return records, skipped
