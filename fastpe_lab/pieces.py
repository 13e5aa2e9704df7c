"""Real music as input: a piece on a grid of sixteenths, its structure, its embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checks, corpus
from .corpus import PITCHES, by_first_appearance, degrees

BACH = Path(__file__).parent / "data" / "bwv846.json"
_FIGURE = (0, 1, 2, 3, 4, 2, 3, 4)
# {pattern of a bar: fewest and most pitches}
_PITCHES = {"block": (0, PITCHES), "run": (16, 16), "broken": (5, 5)}
_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


@dataclass(frozen=True)
class Piece:
    """A piece on a grid of sixteenth notes, with positions in time and in structure.

    Args:
        name: title, or file and song.
        roll: notes that sound, bool [N, 128].
        onset: notes that begin, bool [N, 128].
        time: 0, 1, 2, ..., [N].
        bar: bar number from 0, [N].
        chord: chords, numbered as they appear (REP), [N].
        chroma: pitch classes of the chord, 0 or 1 (BIN), [N, 12].
        key: degree of the chord's root in the key (KEY), from `corpus.degrees`, [N].
        phrase: phrases, numbered as they appear, [N].
    """

    name: str
    roll: np.ndarray
    onset: np.ndarray
    time: np.ndarray
    bar: np.ndarray
    chord: np.ndarray
    chroma: np.ndarray
    key: np.ndarray
    phrase: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def tile(self, length: int) -> Piece:
        """Return the first `length` steps of the piece, repeated without end.

        Time and bars count on; chords, chroma and phrases repeat with the notes.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        step = np.arange(length) % len(self)
        arrays = {f.name: getattr(self, f.name)[step] for f in fields(self) if f.name != "name"}
        arrays["time"] = np.arange(length)
        arrays["bar"] = arrays["bar"] + np.arange(length) // len(self) * (int(self.bar[-1]) + 1)
        return Piece(self.name, **arrays)


def load(path: Path | None = None, song: int = 0) -> Piece:
    """Return Bach's Prelude in C, BWV 846, or one song of an .npz corpus.

    Args:
        path: an .npz file (format in `corpus`), or a .json file like the default.
        song: index into the corpus; 0 for a .json file, which holds one piece.
    """
    path = BACH if path is None else Path(path)
    if not path.is_file():
        raise ValueError(f"data file {checks.printable(path)} does not exist")
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"data file must end in .json or .npz, got {checks.printable(path.name)}")
    return (_load_json if path.suffix == ".json" else _load_npz)(path, song)


def embed(
    piece: Piece,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k [B, T, H, D] and v [B, T, H, E] from the notes, with entries near N(0, 1).

    A step sums fixed Gaussian embeddings of its sounding notes, its onsets and its silence. The sum
    is layer-normalised and projected by three fixed Gaussian matrices. The sequences of a batch are
    transposed by 0, 1, -1, 2, -2, ... semitones, modulo 128.
    """
    for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 1 <= batch <= PITCHES:
        raise ValueError(f"batch must be 1 to {PITCHES}, one transposition each, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    width = num_heads * max(head_dim, value_dim)
    table = torch.randn(2 * PITCHES + 1, width, generator=generator)
    silence = ~piece.roll.any(1, keepdims=True)
    rows = []
    for b in range(batch):
        shift = (b + 1) // 2 * (1 if b % 2 else -1)
        notes = [np.roll(x, shift, axis=1) for x in (piece.roll, piece.onset)]
        rows.append(np.concatenate([*notes, silence], axis=1))
    hot = torch.from_numpy(np.stack(rows)).float()  # [B, T, 257]
    x = torch.nn.functional.layer_norm(hot @ table, (width,))
    out = []
    for size in (head_dim, head_dim, value_dim):
        weight = torch.randn(width, num_heads * size, generator=generator) / width**0.5
        out.append((x @ weight).unflatten(-1, (num_heads, size)).to(dtype))
    return out[0], out[1], out[2]


def _notes_of_bar(bar: dict) -> list[tuple[int, int, int]]:
    # (step, duration, pitch) in sixteenths
    pitches = bar["pitches"]
    if bar["pattern"] == "block":
        return [(0, 16, pitch) for pitch in pitches]
    if bar["pattern"] == "run":
        return [(i, 16 - i if i < 2 else 1, pitch) for i, pitch in enumerate(pitches)]
    half = [(i, 8 - i if i < 2 else 1, pitches[n]) for i, n in enumerate(_FIGURE)]
    return half + [(step + 8, duration, pitch) for step, duration, pitch in half]


def _piece(
    name: str,
    notes: np.ndarray,
    bar: np.ndarray,
    chord: np.ndarray,
    chroma: np.ndarray,
    key: np.ndarray,
    phrase: np.ndarray,
) -> Piece:
    # notes [., 3]: step, duration, pitch; parts outside the grid are cut off
    length = len(bar)
    rolls = corpus.draw(notes, length)
    return Piece(name, *rolls, np.arange(length), bar, chord, chroma, key, phrase)


def _root(chord: str) -> int:
    return (_LETTERS[chord[0]] + chord.count("#", 1, 2) - chord.count("b", 1, 2)) % 12


def _score(path: Path) -> dict:
    # the content of a .json file, with every field checked
    of_score = {"title": str, "steps_per_bar": int, "tonic": int, "bars": list}
    of_bar = {"chord": str, "phrase": str, "pattern": str, "pitches": list, "pitch_classes": list}
    score = checks.record(json.loads(path.read_bytes()), of_score)
    # the patterns have sixteen steps
    checks.within("steps_per_bar", score["steps_per_bar"], corpus.BAR, corpus.BAR)
    checks.within("tonic", score["tonic"], 0, 11)
    checks.within("number of bars", len(score["bars"]), 1, corpus.MOST_BARS)
    for i, bar in enumerate(score["bars"]):
        name = f"bars[{i}]"
        checks.record(bar, of_bar, name)
        if bar["pattern"] not in _PITCHES:
            got = checks.printable(bar["pattern"])
            raise ValueError(f"{name}.pattern must be of {', '.join(_PITCHES)}, got {got}")
        if not bar["chord"].startswith(tuple(_LETTERS)):
            got = checks.printable(bar["chord"])
            raise ValueError(f"{name}.chord must begin with its root, A to G, got {got!r}")
        least, most = _PITCHES[bar["pattern"]]
        checks.within(f"number of {name}.pitches", len(bar["pitches"]), least, most)
        for field, high in (("pitches", PITCHES - 1), ("pitch_classes", 11)):
            for value in bar[field]:
                checks.typed(f"{name}.{field}", value, int)
                checks.within(f"{name}.{field}", value, 0, high)
    return score | {"title": checks.printable(score["title"])}


def _load_json(path: Path, song: int) -> Piece:
    if song != 0:
        raise ValueError(f"song must be 0 for {path.name}, which holds one piece, got {song}")
    try:
        score = _score(path)
    except (ValueError, RecursionError) as error:
        name, why = checks.printable(path), checks.printable(error)
        raise ValueError(f"{name} is not in the expected format: {why}") from error
    bars, per_bar = score["bars"], score["steps_per_bar"]
    notes = [
        (per_bar * i + step, duration, pitch)
        for i, bar in enumerate(bars)
        for step, duration, pitch in _notes_of_bar(bar)
    ]
    chroma = np.array([[p in bar["pitch_classes"] for p in range(12)] for bar in bars])
    root = np.array([_root(bar["chord"]) for bar in bars])
    return _piece(
        score["title"],
        np.array(notes),
        np.repeat(np.arange(len(bars)), per_bar),
        np.repeat(by_first_appearance(bar["chord"] for bar in bars), per_bar),
        np.repeat(chroma.astype(np.int64), per_bar, axis=0),
        np.repeat(degrees(root, chroma, score["tonic"]), per_bar),
        np.repeat(by_first_appearance(bar["phrase"] for bar in bars), per_bar),
    )


def _load_npz(path: Path, song: int) -> Piece:
    songs = corpus.load(path)
    if not 0 <= song < len(songs):
        raise ValueError(f"song must be 0 to {len(songs) - 1} for {path.name}, got {song}")
    found = songs[song]
    bar = np.repeat(np.arange(found.num_bars), corpus.BAR)
    labels = (found.positions(prior) for prior in ("rep", "bin", "key", "phrase"))
    return _piece(found.title, found.notes[:, 1:], bar, *labels)
