"""Harmonize melodies: a small causal Transformer hears a melody and plays the accompaniment to it.

    python examples/harmonize.py                 train, evaluate, generate: minutes on two cores
    python examples/harmonize.py train --pe rope --prior time --feature-map elu1 --out runs/rope
    python examples/harmonize.py evaluate --out runs/rope
    python examples/harmonize.py generate --out runs/rope --song 3 --bars 64

Songs are Bach's chorales, or --data: an .npz (see benchmarks/corpus.py), or a folder of MIDI files.
Everything goes into --out: checkpoint.pt, metrics.json, and of each generation a .mid and a .png.
`train --resume` goes on from the checkpoint, which Ctrl-C leaves too. `generate --melody song.mid`
harmonizes a melody of yours, under chords estimated from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from music import evaluation, midi, pictures, sources
from music.model import ADDED, ENCODINGS, MAPS, Config
from music.training import Budget, Trainer, restore
from music.windows import KEYS, LOWEST, Windows

from baselines import BASELINES
from corpus import ACCOMPANIMENT, MELODY, PITCHES, PRIORS, Song

# where Bach's chorales are kept once parsed, which takes a minute
CHORALES = Path("runs/chorales.npz")
STEPS = 1000


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", default="all", choices=("all", "train", "evaluate", "generate")
    )
    parser.add_argument("--out", type=Path, default=Path("runs/harmonize"))
    parser.add_argument("--data", type=Path, help=".npz, folder of MIDI files; default chorales")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    model = parser.add_argument_group("model")
    model.add_argument(
        "--attention",
        default=Config.attention,
        choices=("linear", *BASELINES),
        metavar="NAME",
        help=f"linear, {', '.join(BASELINES)}; default %(default)s",
    )
    model.add_argument(
        "--pe",
        choices=(*ADDED, *ENCODINGS),
        metavar="NAME",
        help=f"{', '.join((*ADDED, *ENCODINGS))}; default {Config.pe}, none for other attention",
    )
    model.add_argument(
        "--prior", help=f"{', '.join(PRIORS)}, joined by +; default {Config.prior} with structure"
    )
    model.add_argument("--feature-map", default=Config.feature_map, choices=MAPS)
    model.add_argument("--chords", action="store_true", help="the chords are inputs too")
    model.add_argument(
        "--labels", default="own", choices=("own", "another"), help="positions of another song"
    )
    for name in ("dim", "heads", "layers"):
        model.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    training = parser.add_argument_group("training")
    for field in fields(Budget):
        if field.name != "data":
            kind = type(field.default)
            name = f"--{field.name.replace('_', '-')}"
            training.add_argument(name, type=kind, default=field.default)
    training.set_defaults(steps=STEPS, bars=None)
    training.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    training.add_argument("--overwrite", action="store_true", help="train anew, whatever is there")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--song", type=int, default=0, help="which of the test songs")
    generation.add_argument("--melody", type=Path, help="a MIDI file instead")
    generation.add_argument("--first-bar", type=int, default=0)
    generation.add_argument("--play-bars", type=int, default=16, help="to be harmonized")
    generation.add_argument("--temperature", type=float, default=0.0, help="0: by the threshold")
    args = parser.parse_args(argv)
    args.bars = args.bars or default_bars(args.data)
    if args.pe is None:
        args.pe = Config.pe if args.attention == "linear" else "none"
    args.prior = args.prior or default_prior(args.attention, args.pe)
    return args


def default_prior(attention: str, pe: str) -> str:
    """Return the default with what is for structure, else time."""
    structured = attention in BASELINES and BASELINES[attention].structured
    of_structure = structured or pe.startswith(("fstripe", "sape", "ropepool"))
    return Config.prior if of_structure else "time"


def default_bars(path: Path | None) -> int:
    """Return the bars of a window: most chorales have fewer than 16."""
    return Budget.bars if path else 8


def load_songs(path: Path | None) -> dict[str, list[Song]]:
    """Return the songs to train on and those to test on, each with notes to be said."""
    songs = [song for song in sources.songs(path, CHORALES) if len(song.notes)]
    tested = "test" if any(song.split == "test" for song in songs) else "val"
    return {
        "train": [song for song in songs if song.split == "train"],
        "test": [song for song in songs if song.split == tested],
    }


def windows_of(songs: list[Song], config: Config) -> Windows:
    """Return the windows of songs that a model is for."""
    return Windows(songs, config.task, config.prior, chords=config.chords, labels=config.labels)


def train(args: argparse.Namespace, songs: dict[str, list[Song]]) -> bool:
    """Train, or go on; return whether the end was reached."""
    names = {field.name for field in fields(Config)} & vars(args).keys()
    config = Config(**{name: getattr(args, name) for name in names})
    names = {field.name for field in fields(Budget)} & vars(args).keys()
    data = args.data.name if args.data else "chorales"
    budget = Budget(**{name: getattr(args, name) for name in names if name != "data"}, data=data)
    trainer, path = Trainer(config, budget), args.out / "checkpoint.pt"
    if args.resume:
        trainer.resume(path)
    elif path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists: go on from it with train --resume, or --overwrite it")
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{len(songs['train'])} songs of {data}, {count} parameters")
    if trainer.train(windows_of(songs["train"], config), path):
        return True
    print(f"stopped at step {trainer.step}; go on with train --resume")
    return False


def evaluate(args: argparse.Namespace, songs: dict[str, list[Song]]) -> None:
    """Write metrics.json, of windows as long as those trained on and of four times as long."""
    trainer = restore(args.out / "checkpoint.pt")
    config, bars = trainer.config, trainer.budget.bars
    threshold = evaluation.fit_threshold(trainer.model, windows_of(songs["train"], config), bars)
    windows = windows_of(songs["test"], config)
    found: dict = {"config": asdict(config), "budget": asdict(trainer.budget)}
    found |= {"step": trainer.step, "threshold": threshold, "bars": {}}
    for length in (bars, 4 * bars):
        if not windows.starts(length):
            print(f"no song to test on has {length} bars")
            continue
        found["bars"][length] = scores = evaluation.evaluate(
            trainer.model, windows, length, threshold
        )
        print(f"{length} bars: " + ", ".join(f"{name} {x:.4g}" for name, x in scores.items()))
    (args.out / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")


def generate(args: argparse.Namespace, songs: dict[str, list[Song]]) -> None:
    """Write what the model plays to a melody it has not seen, as MIDI and as a picture."""
    trainer = restore(args.out / "checkpoint.pt")
    if args.melody:
        test, i, name = [midi.read(args.melody, accompanied=False)], 0, args.melody.stem
    elif 0 <= args.song < len(songs["test"]):
        test, i, name = songs["test"], args.song, f"song-{args.song}"
    else:
        raise ValueError(f"song must be 0 to {len(songs['test']) - 1}, got {args.song}")
    song = test[i]
    if not 0 <= args.first_bar < song.num_bars:
        raise ValueError(f"first-bar must be 0 to {song.num_bars - 1}, got {args.first_bar}")
    bars = min(args.play_bars, song.num_bars - args.first_bar)
    windows = windows_of(test, trainer.config)
    logits = evaluation.logits_of(trainer.model, windows, [(i, args.first_bar)], bars)[0]
    if args.temperature:
        torch.manual_seed(args.seed)
        said = torch.bernoulli((logits / args.temperature).sigmoid()) > 0
    else:
        of = windows_of(songs["train"], trainer.config)
        threshold = evaluation.fit_threshold(trainer.model, of, trainer.budget.bars)
        said = torch.stack((logits[:, 0].sigmoid() > threshold, logits[:, 1] > 0), 1)
    cut = song.cut(args.first_bar, bars)
    sounding, struck = (widened(x) for x in said.unbind(1))
    path = args.out / f"{name}.mid"
    midi.write(
        path,
        {"melody": cut.roll(MELODY), "accompaniment": sounding},
        {"melody": cut.onsets(MELODY), "accompaniment": struck & sounding},
        song.bpm,
    )
    rolls = {"melody": cut.roll(MELODY), "truth": cut.roll(ACCOMPANIMENT), "generated": sounding}
    if args.melody:
        del rolls["truth"]
    pictures.piano_rolls(cut, rolls, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}: {cut.title}")


def widened(keys: torch.Tensor) -> np.ndarray:
    """Return a roll of all MIDI pitches, bool [T, 128], of one of the piano's keys [T, 88]."""
    roll = np.zeros((len(keys), PITCHES), dtype=bool)
    roll[:, LOWEST : LOWEST + KEYS] = keys.numpy()
    return roll


def main(argv: list[str] | None = None) -> int:
    """Run a command, or all of them; return 1 if it could not be, 130 after Ctrl-C."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    try:
        songs = load_songs(args.data)
        if args.command in ("all", "train") and not train(args, songs):
            return 130
        if args.command in ("all", "evaluate"):
            evaluate(args, songs)
        if args.command in ("all", "generate"):
            generate(args, songs)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
