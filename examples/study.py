"""Compare encodings and structures: train many small models on one budget, with several seeds.

    python examples/study.py                         on Bach's chorales
    python examples/study.py --data pop909_dev.npz --jobs 2
    python examples/study.py --rows none fstripe-bin --steps 30 --seeds 0      a short trial

The script writes three files: study.jsonl with one line for each training, study.md with means over
the seeds and differences seed by seed, and study.png. If you interrupt it and start it again, it
runs only the trainings that study.jsonl does not have yet. NLL is nats a sixteenth for the
accompaniment's keys, on songs that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from harmonize import default_bars, guarded, load_songs, name_of, windows_of
from tqdm import tqdm

from fastpe_lab import checks

from music import evaluation, findings
from music.rows import ROWS
from music.training import Budget, Trainer


def run(name: str, budget: Budget, data: Path | None) -> dict:
    """Train a row and evaluate it; return its record."""
    torch.set_num_threads(1)
    start, config = time.monotonic(), ROWS[name].config
    songs = load_songs(data)
    seen, unseen = (windows_of(songs[part], config) for part in ("train", "test"))
    # a training that could not be judged is not begun
    evaluation.starts_of(unseen, budget.bars)
    trainer = Trainer(config, budget)
    if not trainer.train(seen, quiet=True):
        raise KeyboardInterrupt
    trained = time.monotonic()
    record = {"row": name, "config": asdict(config), "budget": asdict(budget)}
    record |= {"songs": {part: len(songs[part]) for part in songs}, "torch": torch.__version__}
    record["bars"] = {
        bars: evaluation.evaluate(trainer.model, unseen, bars, trainer.threshold)
        for bars in (budget.bars, 4 * budget.bars)
        if unseen.starts(bars)
    }
    seconds = {"training": trained - start, "evaluation": time.monotonic() - trained}
    return record | {"seconds": {key: round(x, 1) for key, x in seconds.items()}}


def read(file: Path, budget: Budget) -> dict[tuple[str, int], dict]:
    """Return the records with this budget, any seed, and the present configuration of their row.

    A line that is no record is skipped, and the reason printed.
    """
    records, skipped = checks.json_lines(file, findings.check) if file.exists() else ([], [])
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    found = {}
    for record in records:
        name, seed = record["row"], record["budget"]["seed"]
        same = name in ROWS and record["config"] == asdict(ROWS[name].config)
        if same and record["budget"] == asdict(replace(budget, seed=seed)):
            found[name, seed] = record
    return found


def train(args: argparse.Namespace, file: Path, budget: Budget) -> tuple[list[dict], bool]:
    """Run the trainings that the file does not have, and append their records.

    Returns:
        records: All records of the budget, old and new.
        good: Whether all trainings succeeded.
    """
    done, good = read(file, budget), True
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        # a line that was cut off stays a line of its own
        with file.open("a") as out:
            out.write("\n")
    wanted = [(name, seed) for seed in args.seeds for name in args.rows]
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.jobs, mp_context=spawn)
    try:
        running = {
            pool.submit(run, name, replace(budget, seed=seed), args.data): (name, seed)
            for name, seed in wanted
            if (name, seed) not in done
        }
        for future in tqdm(as_completed(running), total=len(running), unit="training"):
            try:
                record = future.result()
            except ArithmeticError as error:
                print(f"{running[future]}: {error}", file=sys.stderr)
                good = False
                continue
            line = json.dumps(record)
            with file.open("a") as out:
                out.write(line + "\n")
            done[running[future]] = json.loads(line)
    finally:
        pool.shutdown(cancel_futures=True)
    return list(done.values()), good


def study(args: argparse.Namespace) -> int:
    """Run the missing trainings and report the results; return the exit status."""
    load_songs(args.data)  # parse the chorales once, and show an error as one line
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "study.jsonl"
    budget = Budget(steps=args.steps, data=name_of(args.data), bars=default_bars(args.data))
    records, good = train(args, file, budget)
    if not findings.lengths_of(records):
        raise ValueError(f"nothing was measured: {file} holds no record of these trainings")
    text = f"{findings.report(records)}\n"
    print(text)
    file.with_suffix(".md").write_text(text)
    findings.plot(records, file.with_suffix(".png"))
    return int(not good)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return 1 if a training failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=".npz or folder of MIDI files; default chorales")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="output folder")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="ROW",
        default=list(ROWS),
        help=f"some of {', '.join(ROWS)}; default all",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, default=Budget.steps, help="steps of each training")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    args = parser.parse_args(argv)
    args.threads = 1
    return guarded(study, args)


if __name__ == "__main__":
    sys.exit(main())
