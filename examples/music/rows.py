"""The rows of the study: the grid, its controls, other feature maps, the other task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .model import Config, variant


@dataclass(frozen=True)
class Row:
    """A model of the study.

    Args:
        label: In the table.
        config: configuration of the model.
    """

    label: str
    config: Config


LABELS = {
    "ape": "APE",
    "rope": "RoPE",
    "spe": "SineSPE",
    "fstripe": "F-StrIPE",
    "ropepool": "RoPEPool",
}
STRUCTURE = ("rep", "key", "bin")


def make_rows() -> dict[str, Row]:
    """Return the rows of the table by name: the grid, the controls, other maps, the other task."""
    rows: dict[str, Row] = {}

    def add(name: str, label: str, pe: str, prior: str) -> None:
        config = Config(pe=variant(pe, prior), prior=prior, feature_map="favor")
        rows[name] = Row(label, config)

    add("none", "none", "none", "time")
    for pe, label in LABELS.items():
        for prior in ("time", *STRUCTURE):
            add(f"{pe}-{prior}", f"{label}, {prior}", pe, prior)
    for prior in ("rep", "bin"):
        add(f"fstripe-pooled-{prior}", f"F-StrIPE pooled, {prior}", "fstripe-pooled", prior)

    def more(name: str, base: str, label: str, **options: object) -> None:
        row = rows[base]
        rows[name] = Row(f"{row.label}{label}", replace(row.config, **options))

    more("fstripe-bin-wrong", "fstripe-bin", " of another song", labels="another")
    more("fstripe-time+bin", "fstripe-time", " and bin", prior="time+bin")
    for name in ("none", "rope-time", "rope-bin", "fstripe-bin", "ropepool-bin"):
        more(f"{name}-elu1", name, "; elu+1", feature_map="elu1")
    more("ropepool-bin-wrong-elu1", "ropepool-bin-elu1", ", of another song", labels="another")
    more("ropepool-time+bin-elu1", "ropepool-bin-elu1", ", and time", prior="time+bin")
    for name in ("none", "rope-time-elu1", "fstripe-bin", "ropepool-bin-elu1"):
        more(f"{name}-chords", name, "; chords as input", chords=True)
    for name in ("none", "fstripe-bin", "ropepool-bin-elu1"):
        more(f"{name}-next", name, "; next frame", task="next")
    return rows


ROWS = make_rows()
