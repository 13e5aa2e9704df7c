"""The findings of a study: means and differences in a table, claims, a plot."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from fastpe_lab import checks
from fastpe_lab.records import markdown

from .rows import ROWS

COLOURS = {
    "rope": "#1f77d0",
    "ropepool": "#3aa6c9",
    "spe": "#d1495b",
    "fstripe": "#7a4fb5",
    "fstripe-sff": "#e07b00",
    "fstripe-pooled": "#2a8a4a",
}


# of a record, each a number: the first and those of `SCORES`
NLL = "nll"
SCORES = {
    "f1": "F1",
    "chroma_similarity": "CS",
    "ssm_distance": "SSMD",
    "grooving_similarity": "GS",
    "note_density_distance": "NDD",
}


def check(record: object) -> None:
    """Raise a ValueError unless a record has the fields that are shown here."""
    checks.record(record, {"row": str, "config": dict, "budget": dict, "bars": dict})
    checks.record(record["budget"], {"seed": int}, "budget")
    for bars, found in record["bars"].items():
        if not bars.isdecimal():
            raise ValueError(f"bars must be of whole numbers, got {bars!r}")
        numbers = dict.fromkeys((NLL, *SCORES), (int, float))
        checks.record(found, numbers, f"bars.{bars}")


def interval(values: list[float]) -> str:
    """Return the mean and the half width of its 95 % t interval; the mean alone of one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    # quantiles of Student's t for 1, 2, ... degrees of freedom
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    t = quantiles[min(len(values) - 2, len(quantiles) - 1)]
    return f"{mean:.3f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def report(records: list[dict]) -> str:
    """Return the tables, the values to compare them with, and the claims."""
    parts = (likelihoods(records), scores(records), f"{beside(records)}\n{claims(records)}")
    return "\n\n".join(parts)


def likelihoods(records: list[dict]) -> str:
    """Return NLL with 95 % intervals over seeds, and the gain over "none" seed by seed."""
    lengths = lengths_of(records)
    head = ["", "seeds"]
    for bars in lengths:
        head += [f"NLL, {bars} bars", "less than none"]
    lines = [head]
    for name, found in by_row(records).items():
        line = [ROWS[name].label, str(len(found))]
        for bars in lengths:
            values = values_of(found, bars, NLL)
            gains = gain(records, name, base_of(name), bars)
            ends = sorted({f"{min(gains):.3f}", f"{max(gains):.3f}"}, key=float) if gains else []
            line += [interval(values) if values else "", " to ".join(ends)]
        lines.append(line)
    return markdown(lines)


def scores(records: list[dict]) -> str:
    """Return the means over seeds of F1 and of the papers' scores."""
    lengths = lengths_of(records)
    lines = [["", *(f"{short}, {bars} bars" for bars in lengths for short in SCORES.values())]]
    for name, found in by_row(records).items():
        cells = [values_of(found, bars, score) for bars in lengths for score in SCORES]
        means = [f"{statistics.fmean(cell):.1f}" if cell else "" for cell in cells]
        lines.append([ROWS[name].label, *means])
    return markdown(lines)


def lengths_of(records: list[dict]) -> list[str]:
    """Return the bars of the windows evaluated, as records name them."""
    return sorted({bars for record in records for bars in record["bars"]}, key=int)


def by_row(records: list[dict]) -> dict[str, list[dict]]:
    """Return the records of each row that has some."""
    found = {name: [record for record in records if record["row"] == name] for name in ROWS}
    return {name: some for name, some in found.items() if some}


def values_of(records: list[dict], bars: str, score: str) -> list[float]:
    """Return a score of each record that has windows of so many bars."""
    return [record["bars"][bars][score] for record in records if bars in record["bars"]]


def base_of(name: str) -> str:
    """Return the row without encoding for the same task and inputs, of the same map if there is."""
    config = ROWS[name].config
    plain = replace(config, pe="none", prior="time", labels="own")
    maps = {
        base: row.config.feature_map
        for base, row in ROWS.items()
        if replace(row.config, feature_map=plain.feature_map) == plain
    }
    return min(maps, key=lambda base: maps[base] != config.feature_map)


def gain(records: list[dict], name: str, other: str, bars: str) -> list[float]:
    """Return for each seed how much less NLL a row has than another."""
    found = {
        (record["row"], record["budget"]["seed"]): record["bars"][bars][NLL]
        for record in records
        if bars in record["bars"] and record["row"] in (name, other)
    }
    seeds = sorted({seed for row, seed in found if row == name})
    return [
        found[other, seed] - found[name, seed]
        for seed in seeds
        if name != other and (other, seed) in found
    ]


CLAIMS = (
    ("fstripe-bin", "fstripe-bin-wrong", 0.15),
    ("fstripe-bin", "none", 0.12),
    ("fstripe-bin-next", "none-next", 0.08),
)


def claims(records: list[dict]) -> str:
    """Return the claims about every seed, and whether they hold at each length."""
    lines = []
    for name, other, least in CLAIMS:
        for bars in lengths_of(records):
            gains = gain(records, name, other, bars)
            if gains:
                verdict = "holds" if min(gains) >= least else "DOES NOT HOLD"
                lines.append(
                    f"- {ROWS[name].label} against {ROWS[other].label}, {bars} bars: at least "
                    f"{min(gains):.3f} less in each of {len(gains)}; {least} {verdict}"
                )
    return "\n".join(lines)


def beside(records: list[dict]) -> str:
    """Return what any gain is to be seen beside: the best without structure, and chords as input.

    The best is over encodings of time and feature maps, by the mean over seeds.
    """
    lines = []
    for bars in lengths_of(records):
        means = {
            name: statistics.fmean(values)
            for name, found in by_row(records).items()
            if (values := values_of(found, bars, NLL)) and ROWS[name].config.task == "harmonize"
        }
        plain = [n for n in means if ROWS[n].config.prior == "time" and not ROWS[n].config.chords]
        given = [f"{ROWS[n].label} {means[n]:.3f}" for n in means if ROWS[n].config.chords]
        if plain:
            best = min(plain, key=means.get)
            given.insert(0, f"best without chords: {ROWS[best].label} {means[best]:.3f}")
        if given:
            lines.append(f"- {bars} bars, {', '.join(given)}")
    return "\n".join(lines)


def plot(records: list[dict], path: Path) -> None:
    """Draw every training's NLL by row, a panel for each length."""
    lengths, rows = lengths_of(records), by_row(records)
    figure = Figure(figsize=(6.5 * len(lengths), 0.27 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axis, bars in zip(axes, lengths, strict=True):
        for y, (name, found) in enumerate(rows.items()):
            colour = COLOURS.get(ROWS[name].config.pe, "#777777")
            values = values_of(found, bars, NLL)
            axis.plot(values, [y] * len(values), "o", color=colour, ms=4.5, alpha=0.7)
            if values:
                axis.plot(statistics.fmean(values), y, "|", color=colour, ms=15, mew=2)
        axis.set_title(f"{bars} bars: nats a sixteenth, lower is better", loc="left", fontsize=11)
        axis.set_yticks(range(len(rows)), [ROWS[name].label for name in rows], fontsize=9)
        axis.grid(axis="both", color="#e6e6e6", lw=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110, metadata={"Software": None})
