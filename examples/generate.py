"""Go on with songs: a small causal Transformer predicts one sixteenth after another.

    python examples/generate.py                       train for minutes, go on with a song
    python examples/generate.py --prompt-bars 2 4 8 --bars 64 --save runs/state.pt
    python examples/generate.py --resume runs/state.pt --bars 64
    python examples/generate.py --measure             steps a second and memory, against softmax

The model reads the first bars of each song in one call and then takes one sixteenth a step.
Attention is linear, so the state keeps its size and a step costs the same in a piece of any length.
If the positions are chords, they are those of the song; after its last bar they start again with
its first.

The songs are Bach's chorales. --data takes others: an .npz (see fastpe_lab/corpus.py) or a folder
of MIDI files. The script writes everything into --out: a .mid and a .png for each piece, and
checkpoint.pt, which Ctrl-C leaves too and --model continues from. --measure writes speed.jsonl and
speed.png. --save writes model and states to a file. --resume continues from that file as if the run
had never stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harmonize import (
    add_model,
    default_bars,
    guarded,
    load_songs,
    name_of,
    set_defaults,
    widened,
    windows_of,
)

from fastpe_lab import checks
from fastpe_lab.corpus import BAR, Song

from music import decoding, midi, pictures, speed
from music.model import Config
from music.training import Budget, Trainer, restore

# length of a picture at most
DRAWN_BARS = 64


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/generate"))
    parser.add_argument("--data", type=Path, help=".npz or folder of MIDI files; default chorales")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="seed for training and sampling")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a checkpoint, trained for the task 'next'")
    model.add_argument("--steps", type=int, default=Budget.steps, help="steps to train")
    model.add_argument("--train-bars", type=int, help="bars of a window; default 16, chorales 8")
    model.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
    add_model(model, ("linear", "softmax"), "rope")
    pieces = parser.add_argument_group("pieces")
    pieces.add_argument("--song", type=int, default=0, help="test song of the first piece, from 0")
    pieces.add_argument(
        "--prompt-bars", type=int, nargs="+", default=[4], help="bars to read, for each piece"
    )
    pieces.add_argument("--bars", type=int, default=28, help="bars to add")
    pieces.add_argument("--temperature", type=float, default=0.75, help="0: all above threshold")
    pieces.add_argument("--top-k", type=int, default=8, help="most keys that sound at once")
    pieces.add_argument("--save", type=Path, metavar="STATE")
    pieces.add_argument("--resume", type=Path, metavar="STATE")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--measure", action="store_true")
    measuring.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    measuring.add_argument("--seconds", type=float, default=20.0, help="time for all repeats")
    args = parser.parse_args(argv)
    if args.resume and args.model:
        parser.error("--model and --resume do not go together: a file of --save has its model")
    if args.train_bars is None:
        args.train_bars = default_bars(args.data)
    set_defaults(args, "rope")
    return args


def trained(args: argparse.Namespace, songs: list[Song]) -> Trainer | None:
    """Return a trained model, or None after Ctrl-C.

    If --model names a checkpoint whose training is not complete, the training goes on first.
    """
    path = args.model or args.out / "checkpoint.pt"
    if args.model:
        trainer = restore(path)
    elif path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists: take it with --model, or --overwrite it")
    else:
        names = ("attention", "pe", "prior", "feature_map", "dim", "heads", "layers")
        config = Config(task="next", **{name: getattr(args, name) for name in names})
        sizes = {"steps": args.steps, "bars": args.train_bars, "seed": args.seed}
        budget = Budget(**sizes, data=name_of(args.data))
        trainer = Trainer(config, budget)
    decoding.check(trainer.config)
    if trainer.step < trainer.budget.steps:
        print(f"training on {len(songs)} songs")
        if not trainer.train(windows_of(songs, trainer.config), path):
            print(f"stopped at step {trainer.step}; continue with --model {path}")
            return None
    return trainer


def begin(
    args: argparse.Namespace, trainer: Trainer, songs: dict[str, list[Song]]
) -> tuple[decoding.Pieces, decoding.Sampler]:
    """Read the prompts; return the pieces and the sampler of their keys."""
    chosen = songs["test"][args.song :][: len(args.prompt_bars)] if args.song >= 0 else []
    if len(chosen) < len(args.prompt_bars):
        raise ValueError(
            f"songs {args.song} to {args.song + len(args.prompt_bars) - 1} must be of the "
            f"{len(songs['test'])} test songs, numbered from 0"
        )
    pieces = decoding.Pieces(trainer.model, chosen, args.prompt_bars)
    generator = torch.Generator().manual_seed(args.seed)
    return pieces, decoding.Sampler(trainer.threshold, args.temperature, args.top_k, generator)


def save(
    path: Path, pieces: decoding.Pieces, sampler: decoding.Sampler, prompt_bars: list[int]
) -> None:
    """Write the file that `resume` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"threshold": sampler.threshold, "coins": sampler.generator.get_state()}
    torch.save(pieces.content() | more | {"prompt_bars": prompt_bars}, path)


def resume(
    args: argparse.Namespace,
) -> tuple[decoding.Pieces, decoding.Sampler, list[int]]:
    """Return the pieces, the sampler and the lengths of the prompts from a file of --save.

    The sampler continues with the random numbers of the saved run. Its temperature and top-k come
    from the options.

    Raises:
        ValueError: the file does not exist, or --save did not write it.
    """
    if not args.resume.is_file():
        raise ValueError(f"state {args.resume} does not exist")
    try:
        content = torch.load(args.resume, weights_only=True)
        kinds = {"threshold": float, "coins": torch.Tensor, "prompt_bars": list}
        checks.record(content, kinds)
        checks.within("threshold", content["threshold"], 0, 1)
        pieces = decoding.Pieces.restore(content)
        for bars, roll in zip(content["prompt_bars"], pieces.rolls, strict=True):
            checks.typed("prompt_bars", bars, int)
            checks.within("prompt_bars", bars, 1, len(roll) // BAR)
        generator = torch.Generator()
        generator.set_state(content["coins"])
    except Exception as error:
        raise ValueError(f"{args.resume} is no file of --save: {checks.reason(error)}") from error
    sampler = decoding.Sampler(content["threshold"], args.temperature, args.top_k, generator)
    return pieces, sampler, content["prompt_bars"]


def write(pieces: decoding.Pieces, prompt_bars: list[int], out: Path) -> None:
    """Write each piece as MIDI and as a picture."""
    out.mkdir(parents=True, exist_ok=True)
    for i, (song, roll, prompt) in enumerate(
        zip(pieces.songs, pieces.rolls, prompt_bars, strict=True)
    ):
        sounding, struck = (widened(x) for x in roll.unbind(1))
        read = np.arange(len(roll))[:, None] < prompt * BAR
        parts = {"prompt": sounding & read, "generated": sounding & ~read}
        path = out / f"piece-{i}.mid"
        midi.write(path, parts, dict.fromkeys(parts, struck), song.bpm)
        bars = min(len(roll) // BAR, DRAWN_BARS)
        drawn = decoding.joined([song], bars)
        rolls = {"song": drawn.roll(), "piece": sounding[: bars * BAR]}
        title = f"{song.title}: {prompt} bars, then the model"
        pictures.piano_rolls(drawn, rolls, path.with_suffix(".png"), title)
        print(f"wrote {path}, {len(roll) // BAR} bars, and {path.stem}.png, the first {bars}")


def play(args: argparse.Namespace) -> int:
    """Go on with new or resumed pieces; return the exit status."""
    if args.bars < 1:
        raise ValueError(f"bars must be 1 or more, got {args.bars}")
    if args.resume:
        pieces, sampler, prompt_bars = resume(args)
    else:
        songs = load_songs(args.data)
        trainer = trained(args, songs["train"])
        if trainer is None:
            return 130
        pieces, sampler = begin(args, trainer, songs)
        prompt_bars = args.prompt_bars
    start = time.perf_counter()
    pieces.go_on(args.bars * BAR, sampler)
    seconds = time.perf_counter() - start
    count = args.bars * BAR * len(pieces.rolls)
    lengths = ", ".join(str(len(roll)) for roll in pieces.rolls)
    print(
        f"{count / seconds:.0f} sixteenths a second; states of {pieces.state_bytes() / 1e3:.0f} KB "
        f"after {lengths} sixteenths"
    )
    write(pieces, prompt_bars, args.out)
    if args.save:
        save(args.save, pieces, sampler, prompt_bars)
    return 0


def measure(args: argparse.Namespace) -> int:
    """Measure steps a second and bytes of state at each length; write records and a picture."""
    if min(args.lengths) < 1:
        raise ValueError(f"lengths must be 1 or more, got {min(args.lengths)}")
    songs = load_songs(args.data)["test"]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "speed.jsonl"
    records = speed.measure(songs, sorted(args.lengths), args.seconds)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print("\n".join(map(speed.describe, records)))
    speed.plot(records, path.with_suffix(".png"))
    print(f"wrote {path} and {path.stem}.png")
    return int(any(r.get("wrong") for r in records))


def main(argv: list[str] | None = None) -> int:
    """Play or measure; return the exit status, 1 after an error and 130 after Ctrl-C."""
    args = parse(argv)
    return guarded(measure if args.measure else play, args)


if __name__ == "__main__":
    sys.exit(main())
