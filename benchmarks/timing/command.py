"""The options and the output that the benchmarks' commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import fastpe
from fastpe_lab.clocks import TOLERANCE
from fastpe_lab.records import Setup, backend

SIZES = ("batch", "heads", "head_dim", "threads")
OUT = Path(__file__).parent.parent / "out"


def parser(doc: str, **defaults: object) -> argparse.ArgumentParser:
    """Return a parser that describes itself by a docstring and has the common options.

    Args:
        doc: the docstring.
        defaults: defaults of options that differ from the common ones.
    """
    known = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32", "device": "cpu"} | defaults
    made = plain_parser(doc)
    made.add_argument("--batch", type=int, default=known["batch"])
    made.add_argument("--heads", type=int, default=known["heads"])
    made.add_argument("--head-dim", type=int, default=known["head_dim"])
    made.add_argument("--dtype", choices=sorted(TOLERANCE), default=known["dtype"])
    made.add_argument("--device", choices=("cpu", "cuda"), default=known["device"])
    made.add_argument(
        "--backend", choices=fastpe.backends.NAMES, default="auto", help="backend of fastpe's cases"
    )
    return made


def plain_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with no options but the threads and the folder for results."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=raw)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    return made


def check(made: argparse.ArgumentParser, args: argparse.Namespace, *sizes: str) -> None:
    """Leave with a message if an option or a further size is impossible here."""
    for name in (*sizes, *SIZES):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            made.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch.cuda.is_available() is False")
    if args.backend != "auto":
        try:
            backend(setup(args, 1))
        except (ValueError, RuntimeError) as error:
            made.error(f"--backend {args.backend}: {error}")


def setup(args: argparse.Namespace, length: int, **more: object) -> Setup:
    """Return the setup of the options at a length."""
    names = (*SIZES, "dtype", "device", "backend")
    return Setup(length, **{name: getattr(args, name) for name in names}, **more)


class Lines:
    """A file that gets each record at once, as a line of JSON: an aborted run leaves its records.

    Args:
        path: the file; its folder is made.
        anew: whether lines of earlier runs are deleted.
    """

    def __init__(self, path: Path, anew: bool = True) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            path.write_text("")

    def write(self, record: dict) -> dict:
        """Append a record, and return it."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record


def errors(records: Sequence[dict], *fields: str) -> list[str]:
    """Return a list item for each record with an error, with fields that name the record."""
    failed = [r for r in records if "error" in r]
    return [f"- {', '.join(str(r[f]) for f in fields)}: {r['error']}" for r in failed]
