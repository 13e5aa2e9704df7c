"""Which encoding with which structure? A grid of small trainings on one budget, over seeds.

    python examples/study.py                         on Bach's chorales
    python examples/study.py --data pop909_dev.npz --jobs 2
    python examples/study.py --rows none fstripe-bin --steps 30 --seeds 1      a trial

Writes study.jsonl, one line a training (those found there are not repeated, so that a study that
was cut off goes on), study.md with means over seeds and differences seed by seed, and study.png.
NLL is nats a sixteenth of the accompaniment's keys, on songs not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harmonize import load_songs
from music import evaluation, pictures
from music.model import Config
from music.training import Budget, Trainer
from music.windows import Windows
from tqdm import tqdm

BARS = (16, 64)


@dataclass(frozen=True)
class Row:
    """A model of the study.

    Args:
        label: In the table.
        config: Of the model.
        wrong: Positions are those of another song.
    """

    label: str
    config: Config
    wrong: bool = False


def _rows() -> dict[str, Row]:
    rows = {"none": Row("none", Config(pe="none", prior="time"))}
    rows["ape-time"] = Row("APE, learned", Config(pe="ape", prior="time"))
    for pe, label in (("rope", "RoPE"), ("spe", "SineSPE"), ("fstripe", "F-StrIPE"),
                      ("fstripe-exact", "F-StrIPE, unpooled"), ("ropepool", "RoPEPool")):
        for prior in ("time", "rep", "key", "bin"):
            # SPE of vectors is what the paper calls F-StrIPE:SFF
            kind = "fstripe-sff" if (pe, prior) == ("spe", "bin") else pe
            rows[f"{pe}-{prior}"] = Row(f"{label}, {prior}", Config(pe=kind, prior=prior))
    for prior in ("rep", "key", "bin"):
        rows[f"ape-{prior}"] = Row(f"APE of {prior}", Config(pe="sape", prior=prior))
    for pe in ("none", "fstripe", "fstripe-exact", "rope", "ropepool"):
        pass
    return rows
