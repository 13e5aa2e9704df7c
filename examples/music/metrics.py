"""Scores of generated music beside the true one: the StrIPE papers' four, and F1.

The four are those of arXiv 2502.10491 and 2504.05364. The papers describe them in words; the
definitions here are those of the code that the same author published for StrIPE (ICASSP 2024,
github.com/agarwalmanvi/structurePE, exp/pop909/metrics.py, one track). It works on 16 steps a beat,
rolls here have 4: what that changes stands with each score. The scales of the papers' tables are
not those of that code, and differ from one paper to the other, so compare no numbers across.

Rolls are bool [T, P], a row a sixteenth in 4/4, a column a semitone.
"""

from __future__ import annotations

import numpy as np

# sixteenths
HALF_BEAT, HALF_BAR = 2, 8
CHROMA = 12
_BINS = 20


def chroma_similarity(generated: np.ndarray, truth: np.ndarray) -> float:
    """Return how alike the pitch classes are that are struck in each half bar, 0 to 100.

    The mean over half bars of 100 cos(a, b), a and b the numbers of onsets of each pitch class.
    A half bar in which either is silent counts as 0, even where both are.

    Args:
        generated: Bool [T, P], T a multiple of 8.
        truth: Likewise.
    Returns:
        The score, higher is better.
    Raises:
        ValueError: the rolls are not as above or not of one shape.
    """
    _check(generated, truth, HALF_BAR)
    a, b = (_sums(_chroma(onsets(x)), HALF_BAR) for x in (generated, truth))
    return 100 * float(np.mean(np.sum(_unit(a) * _unit(b), axis=1)))


def grooving_similarity(generated: np.ndarray, truth: np.ndarray) -> float:
    """Return how alike the numbers of onsets a sixteenth are distributed, 0 to 100.

    The numbers of onsets of all sixteenths, as a vector of length 1, make a histogram of 20 bins
    over the range of both; the score is the overlap of the histograms, in per cent. (The authors'
    code takes the mean over bins, T / 20 at the most.) It knows nothing of when notes are struck,
    and where most sixteenths are silent an empty roll scores high: no score to optimise.

    Args:
        generated: Bool [T, P], T at least 1.
        truth: Likewise.
    Returns:
        The score, higher is better.
    Raises:
        ValueError: the rolls are not as above or not of one shape.
    """
    _check(generated, truth)
    counts = _unit(np.stack([onsets(x).sum(1) for x in (generated, truth)]).astype(float))
    limits = counts.min(), counts.max()
    a, b = (np.histogram(x, bins=_BINS, range=limits)[0] for x in counts)
    return 100 * float(np.minimum(a, b).sum() / len(truth))


def note_density_distance(generated: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean difference of the numbers of notes that sound, in notes.

    The mean over sixteenths of |a - b|, a and b the numbers of notes. (The authors' code sums them
    over the four steps of a sixteenth: four times as much, where notes last whole sixteenths.)

    Args:
        generated: Bool [T, P], T at least 1.
        truth: Likewise.
    Returns:
        The distance, lower is better.
    Raises:
        ValueError: the rolls are not as above or not of one shape.
    """
    _check(generated, truth)
    return float(np.mean(np.abs(generated.sum(1) - truth.sum(1))))


def ssm_distance(generated: np.ndarray, truth: np.ndarray, unit: int = HALF_BEAT) -> float:
    """Return the mean difference of the self-similarity matrices, 0 to 100.

    100 times the mean of |A - B|, A and B the cosines between any two units of the same roll, of
    which each has the numbers of sounding cells of each pitch class; 0 where a unit is silent. The
    authors' functions are named for half beats, as the default, but sum 2 of 16 steps a beat.

    Args:
        generated: Bool [T, P], T a multiple of the unit.
        truth: Likewise.
        unit: Sixteenths a unit; 1 gives what the authors' code computes, where notes last whole
            sixteenths.
    Returns:
        The distance, lower is better.
    Raises:
        ValueError: the rolls are not as above or not of one shape.
    """
    _check(generated, truth, unit)
    a, b = (_unit(_sums(_chroma(x), unit)) for x in (generated, truth))
    return 100 * float(np.mean(np.abs(a @ a.T - b @ b.T)))


def f1(generated: np.ndarray, truth: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of the cells that sound, 0 to 100.

    Args:
        generated: Bool [T, P], T at least 1.
        truth: Likewise.
    Returns:
        The score, higher is better; 100 where both rolls are empty.
    Raises:
        ValueError: the rolls are not as above or not of one shape.
    """
    _check(generated, truth)
    sounding = int(generated.sum() + truth.sum())
    return 200 * float((generated & truth).sum()) / sounding if sounding else 100.0


def scores(generated: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return F1 and the papers' four scores by name, of bool [T, P], T a multiple of 8."""
    found = (f1, chroma_similarity, grooving_similarity, note_density_distance, ssm_distance)
    return {score.__name__: score(generated, truth) for score in found}


def onsets(roll: np.ndarray) -> np.ndarray:
    """Return the cells that sound and did not a sixteenth before, bool [T, P]."""
    return roll & ~np.concatenate((np.zeros_like(roll[:1]), roll[:-1]))


def _describe(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__


def _check(generated: np.ndarray, truth: np.ndarray, unit: int = 1) -> None:
    for name, roll in (("generated", generated), ("truth", truth)):
        if not isinstance(roll, np.ndarray) or roll.dtype != bool or roll.ndim != 2:
            raise ValueError(f"{name} must be a bool array [T, P], got {_describe(roll)}")
    if generated.shape != truth.shape:
        raise ValueError(f"generated must have truth's shape {truth.shape}, got {generated.shape}")
    if unit < 1:
        raise ValueError(f"unit must be at least 1, got {unit}")
    if len(truth) % unit or not truth.size:
        raise ValueError(
            f"rolls must have a multiple of {unit} steps and a pitch, got {len(truth)}"
        )


def _chroma(roll: np.ndarray) -> np.ndarray:  # [T, 12]
    octaves = -(-roll.shape[1] // CHROMA)
    wide = np.zeros((len(roll), octaves * CHROMA))
    wide[:, : roll.shape[1]] = roll
    return wide.reshape(len(roll), octaves, CHROMA).sum(1)


def _sums(x: np.ndarray, unit: int) -> np.ndarray:  # [T / unit, ...]
    return x.reshape(-1, unit, *x.shape[1:]).sum(1)


def _unit(x: np.ndarray) -> np.ndarray:
    # rows of length 1, or 0
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
