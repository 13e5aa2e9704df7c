"""Songs that a model goes on with, a sixteenth a step, from the states of its layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

import fastpe
from fastpe_lab import checks, corpus
from fastpe_lab.corpus import BAR, Song

from .model import Config, Model, check_step, saved_config
from .windows import KEYS, Windows, positions_of


def joined(songs: Sequence[Song], bars: int) -> Song:
    """Return songs one after the other, from the first again after the last, as one of `bars` bars.

    Key and tempo are the first one's.
    """
    parts, first = [], 0
    for song in itertools.cycle(songs):
        parts.append(replace(song, notes=song.notes + np.array([0, first * BAR, 0, 0])))
        first += song.num_bars
        if first >= bars:
            break
    names = ("notes", "root", "chroma", "phrase")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(songs[0], num_bars=first, **arrays).cut(0, bars)


@dataclass
class Sampler:
    """Chooses the keys that sound and are struck at a step; each key is a coin of its own.

    Args:
        threshold: Probability at which a key is as likely to sound as not once the temperature is
            low; `evaluation.fit_threshold` finds the one that keeps the density of the songs.
        temperature: 1 takes the probabilities as they are; less draws them away from the threshold;
            at 0 all above it sounds.
        top_k: Keys that may sound at once.
        generator: generator of the random draws.
    """

    threshold: float = 0.5
    temperature: float = 1.0
    top_k: int = KEYS
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be 0 to 1, got {self.threshold}")
        if not self.temperature >= 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 1 <= self.top_k <= KEYS:
            raise ValueError(f"top_k must be 1 to {KEYS}, got {self.top_k}")

    def __call__(self, logits: Tensor, sounding: Tensor) -> Tensor:
        """Return the keys that sound and that are struck, bool [B, 2, 88].

        Args:
            logits: [B, 2, 88].
            sounding: keys that sounded at the step before, bool [B, 88]; others must be struck.
        """
        keys, strikes = logits.unbind(1)
        middle = torch.tensor(self.threshold, dtype=keys.dtype).logit(eps=1e-6)
        keys, strikes = self._toss(keys, middle), self._toss(strikes, torch.zeros_like(middle))
        keys &= logits[:, 0] >= logits[:, 0].topk(self.top_k).values[:, -1:]
        return torch.stack((keys, keys & (strikes | ~sounding)), 1)

    def _toss(self, logits: Tensor, middle: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits > middle
        probability = (middle + (logits - middle) / self.temperature).sigmoid()
        return torch.bernoulli(probability, generator=self.generator).bool()


class Pieces:
    """Beginnings of songs, one piece each, and how a model goes on with all of them at a time.

    A step has one cost however long the pieces are, with linear attention. Where positions, or
    inputs, are of the songs' structure it is each song's own, from its first bar again after its
    last one.

    Args:
        model: a model for the task "next".
        songs: One for each piece.
        bars: How many of each song the model reads; its own ones stand behind them.

    Raises:
        ValueError: the model is of another task or has no step; a song has not as many bars; with
            softmax attention: not all prompts are of one length.
    """

    def __init__(self, model: Model, songs: Sequence[Song], bars: Sequence[int]) -> None:
        check(model.config)
        for song, size in zip(songs, bars, strict=True):
            if not 1 <= size <= song.num_bars:
                raise ValueError(
                    f"prompt must be 1 to {song.num_bars} bars of {song.title}, got {size}"
                )
        self.model, self.songs = model.eval(), list(songs)
        self.rolls, states = [], []
        for song, size in zip(songs, bars, strict=True):
            roll, state = self._read(song, size)
            self.rolls.append(roll)
            states.append(state)
        self.states = [_batched(rows) for rows in zip(*states, strict=True)]

    @torch.no_grad()
    def _read(self, song: Song, bars: int) -> tuple[Tensor, list[object]]:
        c = self.model.config
        window = Windows([song], c.task, c.prior, chords=c.chords).window(0, 0, bars)
        inputs = window.inputs[None].to(self._dtype)
        return window.target.bool(), self.model(inputs, window.positions[None])[1]

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.head.weight.dtype

    @torch.no_grad()
    def go_on(self, steps: int, sampler: Sampler) -> None:
        """Add sixteenths to every piece: `rolls` become longer, [T, 2, 88] each."""
        positions, chroma = self._structure(steps)
        last, played = torch.stack([roll[-1] for roll in self.rolls]), []
        for t in range(steps):
            inputs = last.flatten(1).to(self._dtype)
            if self.model.config.chords:
                inputs = torch.cat((inputs, chroma[:, t]), 1)
            logits, self.states = self.model.step(inputs, positions[:, t], self.states)
            last = sampler(logits, last[:, 0])
            played.append(last)
        rows = torch.stack(played, 1)
        self.rolls = [torch.cat((roll, row)) for roll, row in zip(self.rolls, rows, strict=True)]

    def _structure(self, steps: int) -> tuple[Tensor, Tensor]:
        # positions [B, steps, L] and pitch classes of the chords [B, steps, 12] of what comes
        positions, chroma = [], []
        for song, roll in zip(self.songs, self.rolls, strict=True):
            new = slice(len(roll), len(roll) + steps)
            whole = joined([song], -(-new.stop // BAR))
            positions.append(torch.from_numpy(positions_of(whole, self.model.config.prior)[new]))
            chroma.append(torch.from_numpy(whole.positions("bin")[new]).to(self._dtype))
        return torch.stack(positions), torch.stack(chroma)

    def content(self) -> dict:
        """Return all that is needed to go on, for `torch.save`; the model's parameters too."""
        songs = [
            {name: _tensor(value) for name, value in vars(song).items()} for song in self.songs
        ]
        return {
            "config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "songs": songs,
            "rolls": self.rolls,
            "states": self.states,
        }

    @classmethod
    def restore(cls, content: dict) -> Pieces:
        """Return the pieces of a `content`.

        Raises:
            Exception: it is not what `content` makes; a ValueError where a field has that kind.
        """
        kinds = {"config": dict, "model": dict, "songs": list, "rolls": list, "states": list}
        checks.record(content, kinds)
        pieces = cls.__new__(cls)
        config = saved_config(content["config"], content["model"])
        check(config)
        pieces.model = Model(config).eval()
        pieces.model.to(content["model"]["head.weight"].dtype)
        pieces.model.load_state_dict(content["model"])
        pieces.songs = [_song(saved, f"songs[{i}]") for i, saved in enumerate(content["songs"])]
        pieces.rolls, pieces.states = content["rolls"], content["states"]
        checks.within("number of rolls", len(pieces.rolls), *2 * [len(pieces.songs)])
        checks.within("number of states", len(pieces.states), *2 * [config.layers])
        for roll in pieces.rolls:
            checks.array("roll", _array(roll), (None, 2, KEYS), "b")
        for state in pieces.states:
            _check_state(state, len(pieces.songs))
        return pieces

    def state_bytes(self) -> int:
        """Return the size of the states."""
        return size_of(self.states)


def check(config: Config) -> None:
    """Refuse a model that cannot go on from a state.

    Raises:
        ValueError: it is one.
    """
    for name, allowed in (
        ("task", ("next",)),
        ("attention", ("linear", "softmax")),
        ("labels", ("own",)),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be {' or '.join(allowed)} to go on from a state, got "
                f"{getattr(config, name)!r}"
            )
    check_step(config)


def size_of(states: list[object]) -> int:
    """Return the bytes of states; unused room in a cache does not count."""
    total = 0
    for state in states:
        if isinstance(state, fastpe.LinearAttentionState):
            total += sum(x.nbytes for x in state if isinstance(x, Tensor))
        else:
            *caches, length = state
            total += sum(cache[:, :, :length].nbytes for cache in caches)
    return total


def _batched(rows: Sequence[object]) -> object:
    # one layer's states, of one sequence each
    first = rows[0]
    if isinstance(first, fastpe.LinearAttentionState):
        of_rows = {
            name: torch.cat([getattr(row, name) for row in rows])
            for name in ("s", "z", "c", "lost")
            if getattr(first, name) is not None
        }
        return first._replace(**of_rows, length=torch.tensor([row.length for row in rows]))
    lengths = [length for *_, length in rows]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"prompts must be of one length with softmax attention, got {lengths} sixteenths"
        )
    return (*(torch.cat([row[i] for row in rows]) for i in (0, 1)), lengths[0])


def _song(saved: object, name: str) -> Song:
    known = [field.name for field in fields(Song)]
    checks.record(saved, dict.fromkeys(known, object), name)
    return corpus.checked(Song(**{field: _array(saved[field]) for field in known}))


def _check_state(state: object, count: int) -> None:
    # of `count` sequences, all numbers of it finite
    if isinstance(state, fastpe.LinearAttentionState):
        parts = [x for x in (state.s, state.z, state.c, state.lost) if x is not None]
    else:
        *caches, length = state
        checks.typed("length of a cache", length, int)
        checks.within("length of a cache", length, 1, min(cache.shape[2] for cache in caches))
        # its room ahead holds nothing yet
        parts = [cache[:, :, :length] for cache in caches]
    for part in parts:
        checks.within("batch of a state", len(part), count, count)
        if not bool(part.isfinite().all()):
            raise ValueError("state must be finite")


def _tensor(value: object) -> object:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _array(value: object) -> object:
    return value.numpy() if isinstance(value, Tensor) else value
