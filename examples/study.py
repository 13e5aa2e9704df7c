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
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from harmonize import default_bars, load_songs, windows_of
from tqdm import tqdm

from music import evaluation, findings
from music.rows import ROWS
from music.training import Budget, Trainer


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
        (name, Budget(steps=args.steps, seed=seed, data=data, bars=default_bars(args.data)))
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
    text = f"{findings.report(records)}\n"
    print(text)
    file.with_suffix(".md").write_text(text)
    findings.plot(records, file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
