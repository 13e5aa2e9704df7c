"""Steps a second and bytes of state as a piece grows: linear attention beside softmax with a cache.

All models take the same sixteenths of real songs, timed in turn in one process. A row counts only
if its steps agree with one forward over the whole piece. Models are untrained: the time of a step
does not depend on the parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastpe_lab.clocks import TOLERANCE, alternate, relative_error, spread
from fastpe_lab.corpus import BAR, Song
from fastpe_lab.records import Setup, environment

from .decoding import joined, size_of
from .model import Config, Model
from .windows import Windows

# steps in a measured call
STEPS = 32
ELU, FAVOR = "RoPEPool, elu+1", "F-StrIPE, FAVOR+"
SOFTMAX = "softmax with KV cache, RoPE"
MODELS = {
    ELU: Config(task="next"),
    FAVOR: Config(task="next", pe="fstripe", feature_map="favor"),
    SOFTMAX: Config(task="next", attention="softmax", pe="rope", prior="time"),
}
_COLOURS = {ELU: "#3aa6c9", FAVOR: "#7a4fb5", SOFTMAX: "#555555"}


class Decoder:
    """A model after a context, and the steps that go on from there.

    Args:
        config: configuration of the model.
        songs: songs that the model hears, one after the other.
        context: number of sixteenths before the steps.
    """

    def __init__(self, config: Config, songs: Sequence[Song], context: int) -> None:
        torch.manual_seed(0)
        self.model, self.context = Model(config).eval(), context
        bars = -(-(context + STEPS) // BAR)
        song = joined(songs, bars)
        window = Windows([song], config.task, config.prior).window(0, 0, bars)
        length = slice(context + STEPS)
        self.inputs, self.positions = window.inputs[None, length], window.positions[None, length]

    @torch.no_grad()
    def prepare(self) -> Callable[[], Tensor]:
        """Return a call of STEPS steps, which returns logits [1, STEPS, 2, 88]."""
        before = self.context - 1
        states = self.model(self.inputs[:, :before], self.positions[:, :before])[1]
        # take the last one as a step, so that a cache makes room for more
        self.states = self._step(before, states)[1]
        return self._run

    @torch.no_grad()
    def _run(self) -> Tensor:
        states, found = self.states, []
        for t in range(self.context, self.context + STEPS):
            logits, states = self._step(t, states)
            found.append(logits)
        return torch.stack(found, 1)

    def _step(self, t: int, states: list[object]) -> tuple[Tensor, list[object]]:
        return self.model.step(self.inputs[:, t], self.positions[:, t], states)

    @torch.no_grad()
    def error(self, run: Callable[[], Tensor]) -> float:
        """Return the largest difference from one forward, over the largest logit."""
        whole = self.model(self.inputs, self.positions)[0][:, self.context :]
        return relative_error(run(), whole)


def measure(
    songs: Sequence[Song], bars: Sequence[int], seconds: float = 20.0, patience: float = 300.0
) -> list[dict]:
    """Return a record of each model at each length.

    All models and lengths are timed in turn, so that a slow moment of the machine affects all.

    Args:
        songs: real music, repeated as often as needed.
        bars: numbers of bars before the steps, in ascending order.
        seconds: time for all repeats, which are three or more.
        patience: seconds that the prompt and the check of softmax attention may take. They grow at
            most with the square of the length; longer predicted times are left out.
    """
    rows, calls = [], {}
    for name, config in MODELS.items():
        waited = 0.0
        for before, length in zip((bars[0], *bars[:-1]), bars, strict=True):
            row = _describe(name, config, length)
            rows.append(row)
            predicted = waited * (length / before) ** 2
            if config.attention == "softmax" and predicted > patience:
                row["error"] = f"left out: its forwards may take {predicted:.0f} s"
                waited = predicted
                continue
            start = time.perf_counter()
            call = _checked(Decoder(config, songs, length * BAR), row)
            waited = time.perf_counter() - start
            if call:
                calls[name, length] = call
    times = alternate(calls, "cpu", seconds) if calls else {}
    for row in rows:
        if (key := (row["model"], row["bars"])) in times:
            row["ms"] = spread(times[key])
            row["steps_per_second"] = 1e3 * STEPS / row["ms"]["median"]
    return rows


def _describe(name: str, config: Config, bars: int) -> dict:
    heads, threads = config.heads, torch.get_num_threads()
    setup = Setup(bars * BAR, 1, heads, config.dim // heads, threads=threads)
    row = {"model": name, "bars": bars, "steps": STEPS, "config": asdict(config)}
    return row | asdict(setup) | environment(setup)


def _checked(decoder: Decoder, row: dict) -> Callable[[], Tensor] | None:
    # the call to time, or None if it is wrong
    run = decoder.prepare()
    row["relative_error"] = decoder.error(run)
    if not row["relative_error"] <= TOLERANCE[row["dtype"]][0]:
        row["error"] = f"steps differ from one forward by {row['relative_error']:.1e}"
        row["wrong"] = True
        return None
    row["state_bytes"] = size_of(decoder.states)
    return run


def describe(record: dict) -> str:
    """Return a record as a line."""
    where = f"{record['bars']} bars, {record['model']}: "
    if "error" in record:
        return where + record["error"]
    return (
        f"{where}{record['steps_per_second']:.0f} steps/s, state {record['state_bytes'] / 1e3:.0f} "
        f"KB, steps within {record['relative_error']:.0e} of one forward"
    )


def plot(records: Sequence[dict], path: Path) -> None:
    """Draw steps a second, and bytes of state, over the length of the piece."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {
        "steps_per_second": "steps a second (higher is better)",
        "state_bytes": "bytes of state (lower is better)",
    }
    lengths = sorted({r["bars"] for r in records})
    for axis, (value, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name in MODELS:
            found = [r for r in records if r["model"] == name and "error" not in r]
            line = [r["bars"] for r in found], [r[value] for r in found]
            axis.plot(*line, "o-", color=_COLOURS[name], label=name)
        axis.set(xscale="log", yscale="log", xlabel="bars before the steps", title=title)
        axis.set_xticks(lengths, map(str, lengths))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(EngFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    r = records[-1]
    figure.suptitle(
        f"A sixteenth at a time: dim {r['config']['dim']}, {r['config']['layers']} layers, "
        f"{r['dtype']}, threads: {r['threads']}, {r['cpu']}, torch {r['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
