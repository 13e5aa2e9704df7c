"""The options that every benchmark has: sizes, numbers, machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import TOLERANCE, Setup, backend

import fastpe

SIZES = ("batch", "heads", "head_dim", "threads")


def add(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add the options to a parser, with other defaults where given."""
    known = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32", "device": "cpu"} | defaults
    parser.add_argument("--batch", type=int, default=known["batch"])
    parser.add_argument("--heads", type=int, default=known["heads"])
    parser.add_argument("--head-dim", type=int, default=known["head_dim"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default=known["dtype"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=known["device"])
    parser.add_argument(
        "--backend", choices=fastpe.backends.NAMES, default="auto", help="of fastpe's cases"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, *sizes: str) -> None:
    """Leave with a message unless the options, and further sizes, can be had here."""
    for name in (*sizes, *SIZES):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.backend != "auto":
        try:
            backend(setup(args, 1))
        except (ValueError, RuntimeError) as error:
            parser.error(f"--backend {args.backend}: {error}")


def setup(args: argparse.Namespace, length: int, **more: object) -> Setup:
    """Return the setup of the options at a length."""
    names = (*SIZES, "dtype", "device", "backend")
    return Setup(length, **{name: getattr(args, name) for name in names}, **more)
