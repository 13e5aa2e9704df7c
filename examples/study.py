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
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harmonize import load_songs, windows_of
from tqdm import tqdm

from music import evaluation
from music.model import Config
from music.training import Budget, Trainer


@dataclass(frozen=True)
class Row:
    """A model of the study.

    Args:
        label: In the table.
        config: Of the model.
    """

    label: str
    config: Config


ENCODINGS = {"rope": "RoPE", "spe": "SineSPE", "fstripe": "F-StrIPE", "ropepool": "RoPEPool"}
COLOURS = {
    "rope": "#1f77d0",
    "ropepool": "#3aa6c9",
    "spe": "#d1495b",
    "fstripe": "#7a4fb5",
    "fstripe-sff": "#e07b00",
    "fstripe-pooled": "#2a8a4a",
}
STRUCTURE = ("rep", "key", "bin")


def make_rows() -> dict[str, Row]:
    """Return the rows of the table by name: the grid, the controls, other maps, the other task."""
    rows = {"none": Row("none", Config(pe="none", prior="time"))}
    rows["ape-time"] = Row("APE, time", Config(pe="ape", prior="time"))
    for prior in STRUCTURE:
        rows[f"ape-{prior}"] = Row(f"APE, {prior}", Config(pe="sape", prior=prior))
    for pe, label in ENCODINGS.items():
        for prior in ("time", *STRUCTURE):
            # SPE of vectors is what the paper calls F-StrIPE:SFF
            kind = "fstripe-sff" if (pe, prior) == ("spe", "bin") else pe
            rows[f"{pe}-{prior}"] = Row(f"{label}, {prior}", Config(pe=kind, prior=prior))
    for prior in ("rep", "bin"):
        config = Config(pe="fstripe-pooled", prior=prior)
        rows[f"fstripe-pooled-{prior}"] = Row(f"F-StrIPE pooled, {prior}", config)

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


def run(name: str, budget: Budget, data: Path | None) -> dict:
    """Train a row and evaluate it; return its record."""
    torch.set_num_threads(1)
    start, config = time.monotonic(), ROWS[name].config
    songs = load_songs(data)
    seen, unseen = (windows_of(songs[part], config) for part in ("train", "test"))
    trainer = Trainer(config, budget)
    trainer.train(seen, quiet=True)
    trained = time.monotonic()
    threshold = evaluation.fit_threshold(trainer.model, seen, budget.bars)
    record = {"row": name, "config": asdict(config), "budget": asdict(budget)}
    record |= {"songs": {part: len(songs[part]) for part in songs}, "torch": torch.__version__}
    record["bars"] = {
        bars: evaluation.evaluate(trainer.model, unseen, bars, threshold)
        for bars in (budget.bars, 4 * budget.bars)
        if unseen.starts(bars)
    }
    seconds = {"training": trained - start, "evaluation": time.monotonic() - trained}
    return record | {"seconds": {key: round(x, 1) for key, x in seconds.items()}}


def key_of(record: dict) -> tuple:
    """Return what makes a training the same as another."""
    parts = (record[name] for name in ("row", "config", "budget"))
    return tuple(json.dumps(part, sort_keys=True) for part in parts)


def interval(values: list[float]) -> str:
    """Return the mean and the half width of its 95 % t interval; the mean alone of one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    # quantiles of Student's t for 1, 2, ... degrees of freedom
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    t = quantiles[min(len(values) - 2, len(quantiles) - 1)]
    return f"{mean:.3f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.3f}"


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


def main(argv: list[str] | None = None) -> int:
    """Run what is not in the file yet, and write table and plot; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="as in harmonize.py; default chorales")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    args = parser.parse_args(argv)
    try:
        load_songs(args.data)  # the chorales are parsed once
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "study.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    data = args.data.name if args.data else "chorales"
    jobs = [
        (name, Budget(steps=args.steps, seed=seed, data=data))
        for seed in args.seeds
        for name in args.rows
    ]
    done = {key_of(record) for record in records}
    jobs = [
        (name, budget)
        for name, budget in jobs
        if key_of({"row": name, "config": asdict(ROWS[name].config), "budget": asdict(budget)})
        not in done
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool, file.open("a") as out:
        running = [pool.submit(run, name, budget, args.data) for name, budget in jobs]
        for future in tqdm(as_completed(running), total=len(running), unit="training"):
            out.write(json.dumps(future.result()) + "\n")
            out.flush()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    text = f"{table(records)}\n\n{claims(records)}\n"
    print(text)
    file.with_suffix(".md").write_text(text)
    plot(records, file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
