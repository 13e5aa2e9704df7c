"""Train a small causal Transformer that hears a melody and plays an accompaniment to it.

    python examples/harmonize.py                 train, evaluate, generate: minutes on two cores
    python examples/harmonize.py train --pe rope --prior time --feature-map elu1 --out runs/rope
    python examples/harmonize.py evaluate --out runs/rope
    python examples/harmonize.py generate --out runs/rope --song 3 --play-bars 64

The songs are Bach's chorales. --data takes others: an .npz (see fastpe_lab/corpus.py) or a folder
of MIDI files. The script writes everything into --out: checkpoint.pt, metrics.json, and a .mid and
a .png for each generation.

Ctrl-C leaves a checkpoint too. `train --resume` with the same options continues from it. The
commands evaluate and generate read the model's options from the checkpoint.
`generate --melody song.mid` harmonizes a melody of yours; it estimates the chords from the melody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from fastpe_lab import checks
from fastpe_lab.baselines import BASELINES
from fastpe_lab.corpus import ACCOMPANIMENT, MELODY, PITCHES, PRIORS, Song

from music import decoding, evaluation, midi, pictures, sources
from music.model import ADDED, ENCODINGS, MAPS, Config, takes_labels, variant
from music.training import Budget, Trainer, restore
from music.windows import KEYS, LOWEST, Windows

# parsing the chorales takes a minute or two, so this file keeps them
CHORALES = Path("runs/chorales.npz")
# more than in the study, so that the result is worth hearing
STEPS = 1000
CHECKPOINT = "checkpoint.pt"
HELP = {
    "steps": "number of updates",
    "batch": "windows a step",
    "bars": "bars of a window; default 16, for chorales 8",
    "lr": "peak learning rate",
    "position_lr": "factor on lr for the parameters of encodings",
    "seed": "seed for parameters, noise, windows and sampling",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", default="all", choices=("all", "train", "evaluate", "generate")
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/harmonize"), help="folder; default %(default)s"
    )
    parser.add_argument("--data", type=Path, help=".npz or folder of MIDI files; default chorales")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    model = parser.add_argument_group("model, for train")
    add_model(model, ("linear", *BASELINES), "none")
    model.add_argument("--chords", action="store_true", help="give the chords as inputs too")
    model.add_argument(
        "--labels", default="own", choices=("own", "another"), help="song that gives the positions"
    )
    training = parser.add_argument_group("training")
    defaults = {field.name: field.default for field in fields(Budget)}
    for name, text in HELP.items():
        default = {"steps": STEPS, "bars": None}.get(name, defaults[name])
        text += "" if default is None else "; default %(default)s"
        option, kind = f"--{name.replace('_', '-')}", type(defaults[name])
        training.add_argument(option, type=kind, default=default, help=text)
    again = training.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    again.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--song", type=int, default=0, help="number of a test song, from 0")
    generation.add_argument("--melody", type=Path, help="a MIDI file, instead of a test song")
    generation.add_argument("--first-bar", type=int, default=0, help="bar to begin with, from 0")
    generation.add_argument("--play-bars", type=int, default=16, help="number of bars to harmonize")
    generation.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): all keys above the threshold"
    )
    args = parser.parse_args(argv)
    args.bars = default_bars(args.data) if args.bars is None else args.bars
    set_defaults(args, "none")
    with contextlib.suppress(ValueError):  # an unknown prior, which Config refuses
        args.pe = variant(args.pe, args.prior)
    return args


def add_model(group: argparse._ArgumentGroup, attentions: Sequence[str], otherwise: str) -> None:
    """Add the options of a model.

    Args:
        group: Group of options that gets them.
        attentions: Names that --attention accepts.
        otherwise: Default encoding for attention that is not linear.
    """
    group.add_argument(
        "--attention",
        default=Config.attention,
        choices=attentions,
        metavar="NAME",
        help=f"{', '.join(attentions)}; default %(default)s",
    )
    names = (*ADDED, *ENCODINGS)
    group.add_argument(
        "--pe",
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)}; default {Config.pe}, {otherwise} for other attention",
    )
    group.add_argument(
        "--prior", help=f"{', '.join(PRIORS)}, joined by +; default {Config.prior} with structure"
    )
    group.add_argument("--feature-map", default=Config.feature_map, choices=MAPS)
    for name in ("dim", "heads", "layers"):
        group.add_argument(f"--{name}", type=int, default=getattr(Config, name))


def set_defaults(args: argparse.Namespace, otherwise: str) -> None:
    """Set the encoding and the prior if they are missing; `otherwise` is as in `add_model`."""
    if args.pe is None:
        args.pe = Config.pe if args.attention == "linear" else otherwise
    if args.prior is None:
        args.prior = default_prior(args.attention, args.pe)


def default_prior(attention: str, pe: str) -> str:
    """Return the default prior: structure for models that are made for it, else time."""
    of_structure = takes_labels(attention) or pe.startswith(("fstripe", "sape", "ropepool"))
    return Config.prior if of_structure else "time"


def default_bars(path: Path | None) -> int:
    """Return the length of a window in bars: 8 for chorales, as most have fewer than 16 bars."""
    return Budget.bars if path else 8


def load_songs(path: Path | None) -> dict[str, list[Song]]:
    """Return the training songs and the test songs, without songs that have no notes."""
    songs = [song for song in sources.songs(path, CHORALES) if len(song.notes)]
    tested = "test" if any(song.split == "test" for song in songs) else "val"
    return {
        "train": [song for song in songs if song.split == "train"],
        "test": [song for song in songs if song.split == tested],
    }


def windows_of(songs: list[Song], config: Config) -> Windows:
    """Return windows of the songs, as the model needs them."""
    return Windows(songs, config.task, config.prior, chords=config.chords, labels=config.labels)


def name_of(path: Path | None) -> str:
    """Return the name of the songs, as checkpoints keep it."""
    return checks.printable(path.name) if path else "chorales"


def prepare(args: argparse.Namespace) -> Trainer:
    """Return the trainer that the options describe, new or resumed from its checkpoint."""
    made = [
        {field.name: getattr(args, field.name) for field in fields(kind) if field.name in args}
        for kind in (Config, Budget)
    ]
    trainer = Trainer(Config(**made[0]), Budget(**made[1] | {"data": name_of(args.data)}))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / CHECKPOINT
    if args.resume:
        trainer.resume(path)
    elif path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists: go on from it with train --resume, or --overwrite it")
    return trainer


def train(trainer: Trainer, songs: list[Song], out: Path) -> bool:
    """Train, and return whether the training reached the end of its budget."""
    config, count = trainer.config, sum(p.numel() for p in trainer.model.parameters())
    print(f"attention {config.attention}, pe {config.pe}, prior {config.prior}")
    if config.prior != "time" and not trainer.model.positioned:
        print("this model takes no positions, so the prior has no effect")
    print(f"{len(songs)} songs of {trainer.budget.data}, {count} parameters")
    if trainer.train(windows_of(songs, config), out / CHECKPOINT):
        return True
    print(f"stopped at step {trainer.step}; continue with train --resume")
    return False


def finished(path: Path, data: Path | None) -> Trainer:
    """Return the trainer of a checkpoint whose training is complete."""
    trainer = restore(path)
    if trainer.threshold is None:
        raise ValueError(
            f"{path} is of step {trainer.step} of {trainer.budget.steps}: go on with train --resume"
        )
    if trainer.budget.data != name_of(data):
        print(f"trained on {trainer.budget.data}, now on {name_of(data)}")
    return trainer


def evaluate(trainer: Trainer, songs: list[Song], out: Path) -> None:
    """Write metrics.json, for windows as long as in training and four times as long."""
    windows, bars = windows_of(songs, trainer.config), trainer.budget.bars
    found: dict = {"config": asdict(trainer.config), "budget": asdict(trainer.budget)}
    found |= {"step": trainer.step, "threshold": trainer.threshold, "bars": {}}
    for length in (bars, 4 * bars):
        try:
            scores = evaluation.evaluate(trainer.model, windows, length, trainer.threshold)
        except ValueError as error:
            print(f"{length} bars: not evaluated: {error}")
            continue
        found["bars"][length] = scores
        print(f"{length} bars: " + ", ".join(f"{name} {x:.4g}" for name, x in scores.items()))
    if not found["bars"]:
        raise ValueError("nothing was measured: no test song is long enough")
    path = out / "metrics.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


def generate(args: argparse.Namespace, trainer: Trainer, tests: list[Song]) -> None:
    """Write the model's accompaniment to an unseen melody, as MIDI and as a picture."""
    if args.melody:
        if trainer.config.labels == "another":
            raise ValueError("melody must not be given to a model trained with --labels another")
        tests, args.song = [midi.read(args.melody, accompanied=False)], 0
    if not 0 <= args.song < len(tests):
        raise ValueError(f"song must be 0 to {len(tests) - 1}, got {args.song}")
    song = tests[args.song]
    if not 0 <= args.first_bar < song.num_bars:
        raise ValueError(f"first-bar must be 0 to {song.num_bars - 1}, got {args.first_bar}")
    if args.play_bars < 1:
        raise ValueError(f"play-bars must be 1 or more, got {args.play_bars}")
    bars = min(args.play_bars, song.num_bars - args.first_bar)
    start = args.song, args.first_bar
    windows = windows_of(tests, trainer.config)
    logits, _ = evaluation.outputs_of(trainer.model, windows, [start], bars)
    coins = torch.Generator().manual_seed(args.seed)
    sampler = decoding.Sampler(trainer.threshold, args.temperature, generator=coins)
    said = [torch.zeros(1, 2, KEYS, dtype=torch.bool)]
    for at_step in logits.unbind(1):
        said.append(sampler(at_step, said[-1][:, 0]))
    sounding, struck = (widened(x) for x in torch.cat(said[1:]).unbind(1))
    cut = song.cut(args.first_bar, bars)
    name = f"{args.melody.stem}-harmonized" if args.melody else f"song-{args.song}"
    path = args.out / f"{name}.mid"
    parts = {"melody": cut.roll(MELODY), "accompaniment": sounding}
    midi.write(path, parts, {"melody": cut.onsets(MELODY), "accompaniment": struck}, song.bpm)
    rolls = {"melody": cut.roll(MELODY), "truth": cut.roll(ACCOMPANIMENT), "generated": sounding}
    if args.melody:
        del rolls["truth"]
    pictures.piano_rolls(cut, rolls, path.with_suffix(".png"))
    names = checks.printable(f"{path} and {path.with_suffix('.png').name}")
    print(f"wrote {names}: {cut.title}")


def widened(keys: torch.Tensor) -> np.ndarray:
    """Return a roll of all MIDI pitches, bool [T, 128], from one of piano keys, [T, 88]."""
    roll = np.zeros((len(keys), PITCHES), dtype=bool)
    roll[:, LOWEST : LOWEST + KEYS] = keys.numpy()
    return roll


def run(args: argparse.Namespace) -> int:
    """Run a command, or all of them; return the exit status."""
    trained = args.command in ("all", "train")
    trainer = prepare(args) if trained else finished(args.out / CHECKPOINT, args.data)
    if args.command == "generate" and args.melody:
        # do not load the songs: parsing them may take minutes
        generate(args, trainer, [])
        return 0
    songs = load_songs(args.data)
    if trained and not train(trainer, songs["train"], args.out):
        return 130
    if args.command in ("all", "evaluate"):
        evaluate(trainer, songs["test"], args.out)
    if args.command in ("all", "generate"):
        generate(args, trainer, songs["test"])
    return 0


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a program; return 1 after an error, which it prints, and 130 after Ctrl-C."""
    try:
        if args.threads < 1:
            raise ValueError(f"threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
        return run(args)
    except (ValueError, ImportError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    return guarded(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
