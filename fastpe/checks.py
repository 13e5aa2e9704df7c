"""Checks of arguments that modules of every kind have."""

from __future__ import annotations


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless a value is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
