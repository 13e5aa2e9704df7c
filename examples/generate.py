"""Go on with songs: a small causal Transformer says the next sixteenth, again and again.

    python examples/generate.py                       train for minutes, go on with a song
    python examples/generate.py --prompt-bars 2 4 8 --bars 64 --save runs/state.pt
    python examples/generate.py --resume runs/state.pt --bars 64
    python examples/generate.py --measure             steps a second and memory, beside softmax

The first bars of test songs are read at once, then each step costs the same however long the piece
is: attention is linear, its state has one size. Chords that come, where the encoding is of them,
are the song's own, from its first bar again after its last. Songs are Bach's chorales, or --data:
an .npz (see benchmarks/corpus.py), or a folder of MIDI files. Everything goes into --out: of each
piece a .mid and a .png, checkpoint.pt (Ctrl-C leaves it too; --model goes on from it), and of
--measure speed.jsonl and speed.png. --save keeps model and states in a file, from which --resume
goes on as if nothing had happened.
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

from music import decoding, midi, pictures, speed
from music.model import Config
from music.training import Budget, Trainer, restore

import checks
from corpus import BAR, Song

# a picture has no more
DRAWN_BARS = 64


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/generate"))
    parser.add_argument("--data", type=Path, help=".npz, folder of MIDI files; default chorales")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="checkpoint of a training for the task 'next'")
    model.add_argument("--steps", type=int, default=Budget.steps, help="of training without one")
    model.add_argument("--train-bars", type=int, help="of a window; default 16, of chorales 8")
    model.add_argument("--overwrite", action="store_true", help="a checkpoint that is there")
    add_model(model, ("linear", "softmax"), "rope")
    pieces = parser.add_argument_group("pieces")
    pieces.add_argument("--song", type=int, default=0, help="the first one's, of the test songs")
    pieces.add_argument(
        "--prompt-bars", type=int, nargs="+", default=[4], help="of each piece, of a song each"
    )
    pieces.add_argument("--bars", type=int, default=28, help="to add")
    pieces.add_argument("--temperature", type=float, default=0.75, help="0: by the threshold")
    pieces.add_argument("--top-k", type=int, default=8, help="keys that may sound at once")
    pieces.add_argument("--save", type=Path, metavar="STATE")
    pieces.add_argument("--resume", type=Path, metavar="STATE")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--measure", action="store_true")
    measuring.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    measuring.add_argument("--seconds", type=float, default=20.0, help="for all repeats")
    args = parser.parse_args(argv)
    if args.resume and args.model:
        parser.error("--model: --resume has a model")
    if args.train_bars is None:
        args.train_bars = default_bars(args.data)
    set_defaults(args, "rope")
    return args


def trained(args: argparse.Namespace, songs: list[Song]) -> Trainer | None:
    """Return a trained model, new or from a checkpoint that is first trained to its end.

    None after Ctrl-C.
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
        print(f"trains on {len(songs)} songs")
        if not trainer.train(windows_of(songs, trainer.config), path):
            print(f"stopped at step {trainer.step}; go on with --model {path}")
            return None
    return trainer


def begin(
    args: argparse.Namespace, trainer: Trainer, songs: dict[str, list[Song]]
) -> tuple[decoding.Pieces, decoding.Sampler]:
    """Return the prompts as read, and how keys are chosen."""
    chosen = songs["test"][args.song :][: len(args.prompt_bars)] if args.song >= 0 else []
    if len(chosen) < len(args.prompt_bars):
        raise ValueError(
            f"songs {args.song} to {args.song + len(args.prompt_bars) - 1} must be of the "
            f"{len(songs['test'])} test songs, which count from 0"
        )
    pieces = decoding.Pieces(trainer.model, chosen, args.prompt_bars)
    generator = torch.Generator().manual_seed(args.seed)
    return pieces, decoding.Sampler(trainer.threshold, args.temperature, args.top_k, generator)


def save(
    path: Path, pieces: decoding.Pieces, sampler: decoding.Sampler, prompt_bars: list[int]
) -> None:
    """Write what `resume` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"threshold": sampler.threshold, "coins": sampler.generator.get_state()}
    torch.save(pieces.content() | more | {"prompt_bars": prompt_bars}, path)


def resume(
    args: argparse.Namespace,
) -> tuple[decoding.Pieces, decoding.Sampler, list[int]]:
    """Return pieces, coins and bars read as they were; temperature and top-k are the options'.

    Raises:
        ValueError: there is no such file, or it is another one.
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
    """Go on with pieces, new or resumed; return the exit status."""
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
    """Write steps a second and bytes of state over the length, as lines and as a picture."""
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
    """Play or measure; return 1 if it could not be, 130 after Ctrl-C."""
    args = parse(argv)
    return guarded(measure if args.measure else play, args)


if __name__ == "__main__":
    sys.exit(main())
