"""What a study found: means and differences in a table, what is claimed, a plot."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from .model import Config
from .rows import ROWS

COLOURS = {
    "rope": "#1f77d0",
    "ropepool": "#3aa6c9",
    "spe": "#d1495b",
    "fstripe": "#7a4fb5",
    "fstripe-sff": "#e07b00",
    "fstripe-pooled": "#2a8a4a",
}


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
    """Return the table, what is to be seen beside it, and what is claimed."""
    return f"{table(records)}\n\n{beside(records)}\n{claims(records)}"


def table(records: list[dict]) -> str:
    """Return means and 95 % intervals over seeds, and differences from "none" seed by seed."""
    lengths = sorted({int(bars) for record in records for bars in record["bars"]})
    head = ["", "seeds"]
    for bars in lengths:
        head += [f"NLL, {bars} bars", "less than none", "F1"]
    lines = [head]
    for name, row in ROWS.items():
        found = [record for record in records if record["row"] == name]
        if not found:
            continue
        line = [row.label, str(len(found))]
        for bars in map(str, lengths):
            scores = [record["bars"][bars] for record in found if bars in record["bars"]]
            gains = gain(records, name, base_of(name), bars)
            line += [
                interval([s["nll"] for s in scores]) if scores else "",
                f"{min(gains):.3f} to {max(gains):.3f}" if gains else "",
                f"{statistics.fmean(s['f1'] for s in scores):.1f}" if scores else "",
            ]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["---", *["--:"] * (len(head) - 1)])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def base_of(name: str) -> str:
    """Return the row without encoding for the same task and inputs, of the same map if there is."""
    config = ROWS[name].config
    bases = {
        base: row.config.feature_map
        for base, row in ROWS.items()
        if replace(row.config, feature_map="favor")
        == replace(
            Config(),
            pe="none",
            prior="time",
            task=config.task,
            chords=config.chords,
            feature_map="favor",
        )
    }
    return min(bases, key=lambda base: bases[base] != config.feature_map)


def gain(records: list[dict], name: str, other: str, bars: str) -> list[float]:
    """Return for each seed how much less NLL a row has than another."""
    found = {
        (record["row"], record["budget"]["seed"]): record["bars"][bars]["nll"]
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
    """Return what is claimed of every seed, and whether it holds at each length."""
    lines = []
    for name, other, least in CLAIMS:
        for bars in sorted({int(bars) for record in records for bars in record["bars"]}):
            gains = gain(records, name, other, str(bars))
            if gains:
                verdict = "holds" if min(gains) >= least else "DOES NOT HOLD"
                lines.append(
                    f"- {ROWS[name].label} against {ROWS[other].label}, {bars} bars: at least "
                    f"{min(gains):.3f} in {len(gains)} seeds; {least} {verdict}"
                )
    return "\n".join(lines)


def beside(records: list[dict]) -> str:
    """Return what any gain is to be seen beside: the best without structure, and chords as input.

    The best is over encodings of time and feature maps, by the mean over seeds.
    """
    lines = []
    for bars in sorted({int(bars) for record in records for bars in record["bars"]}):
        means: dict[str, float] = {}
        for name in ROWS:
            nlls = [r["bars"][str(bars)]["nll"] for r in records if r["row"] == name]
            if nlls and ROWS[name].config.task == "harmonize":
                means[name] = statistics.fmean(nlls)
        plain = [n for n in means if ROWS[n].config.prior == "time" and not ROWS[n].config.chords]
        if plain:
            best = min(plain, key=means.get)
            lines.append(
                f"- {bars} bars, best without chords: {ROWS[best].label}, {means[best]:.3f}"
            )
        given = [f"{ROWS[n].label} {means[n]:.3f}" for n in means if ROWS[n].config.chords]
        if given:
            lines.append(f"- {bars} bars, {', '.join(given)}")
    return "\n".join(lines)


def plot(records: list[dict], path: Path) -> None:
    """Draw every training's NLL by row, a panel for each length."""
    from matplotlib.figure import Figure

    lengths = sorted({int(bars) for record in records for bars in record["bars"]})
    names = [name for name in ROWS if any(record["row"] == name for record in records)]
    figure = Figure(figsize=(6.5 * len(lengths), 0.27 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axis, bars in zip(axes, lengths, strict=True):
        for y, name in enumerate(names):
            config = ROWS[name].config
            values = [
                record["bars"][str(bars)]["nll"]
                for record in records
                if record["row"] == name and str(bars) in record["bars"]
            ]
            colour = COLOURS.get(config.pe, "#777777")
            axis.plot(values, [y] * len(values), "o", color=colour, ms=4.5, alpha=0.7)
            if values:
                axis.plot(statistics.fmean(values), y, "|", color=colour, ms=15, mew=2)
        axis.set_title(f"{bars} bars: nats a sixteenth, lower is better", loc="left", fontsize=11)
        axis.set_yticks(range(len(names)), [ROWS[name].label for name in names], fontsize=9)
        axis.grid(axis="both", color="#e6e6e6", lw=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110, metadata={"Software": None})
