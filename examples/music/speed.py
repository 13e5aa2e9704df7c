"""Steps a second and bytes of state as a piece grows: linear attention beside softmax with a cache.

All models take the same sixteenths of real songs, timed in turn in one process. A row counts only
if its steps are what one forward over the whole piece says. Parameters are as at the start of a
training, which the time of a step does not depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from harness import TOLERANCE, Setup, alternate, environment, relative_error, spread
from torch import Tensor

from .decoding import joined, size_of
from .model import Config, Model
from .windows import Windows
from corpus import BAR, Song

# of a measured call
STEPS = 32
LINEAR, ELU, SOFTMAX = "F-StrIPE, FAVOR+", "RoPE, elu+1", "softmax with KV cache, RoPE"
MODELS = {
    LINEAR: Config(task="next"),
    ELU: Config(task="next", pe="rope", prior="time", feature_map="elu1"),
    SOFTMAX: Config(task="next", attention="softmax", pe="rope", prior="time"),
}
_COLOURS = {LINEAR: "#c02a4b", ELU: "#e08a2e", SOFTMAX: "#555555"}


class Decoder:
    """A model after a context, and the steps that go on from there.

    Args:
        config: Of the model.
        songs: What it hears, one after the other.
        context: Sixteenths before the steps.
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
        # one more as a step: a cache makes room for more with it
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
    songs: Sequence[Song], bars: Sequence[int], seconds: float = 2.0, patience: float = 300.0
) -> Iterator[dict]:
    """Yield a record of each model at each length.

    Args:
        songs: Real music, repeated as often as needed.
        bars: Lengths of what was decoded before, in ascending order.
        seconds: For the repeats at a length.
        patience: Seconds that the prompt and the check of softmax attention may take, which grow
            with the square of the length at most; where more are predicted it is left out.
    """
    waited: dict[str, tuple[float, int]] = {}
    for length in bars:
        calls, rows = {}, []
        for name, config in MODELS.items():
            setup = Setup(
                length * BAR, 1, config.heads, config.dim // config.heads,
                threads=torch.get_num_threads(),
            )  # fmt: skip
            row = {"model": name, "bars": length, "steps": STEPS, "config": asdict(config)}
            row |= asdict(setup) | environment(setup)
            rows.append(row)
            if config.attention == "softmax" and name in waited:
                predicted = waited[name][0] * (length / waited[name][1]) ** 2
                if predicted > patience:
                    row["error"] = f"left out: its forwards may take {predicted:.0f} s"
                    continue
            decoder = Decoder(config, songs, setup.length)
            start = time.perf_counter()
            run = decoder.prepare()
            row["relative_error"] = decoder.error(run)
            waited[name] = time.perf_counter() - start, length
            if not row["relative_error"] <= TOLERANCE[setup.dtype][0]:
                row["error"] = f"steps differ from one forward by {row['relative_error']:.1e}"
                row["wrong"] = True
                continue
            row["state_bytes"] = size_of(decoder.states)
            calls[name] = run
        times = alternate(calls, "cpu", seconds)
        for row in rows:
            if row["model"] in times:
                row["ms"] = spread(times[row["model"]])
                row["steps_per_second"] = 1e3 * STEPS / row["ms"]["median"]
            yield row


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

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, value, title in zip(
        figure.subplots(1, 2),
        ("steps_per_second", "state_bytes"),
        ("steps a second (higher is better)", "bytes of state (lower is better)"),
        strict=True,
    ):
        for name in MODELS:
            found = [r for r in records if r["model"] == name and "error" not in r]
            lengths = [r["bars"] for r in found]
            axis.plot(
                lengths, [r[value] for r in found], "o-", color=_COLOURS[name], label=name
            )  # fmt: skip
        axis.set_xscale("log", base=4)
        axis.set(yscale="log", xlabel="bars before the steps", title=title)
        axis.set_xticks(ticks := sorted({r["bars"] for r in records}), map(str, ticks))
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    r = records[-1]
    figure.suptitle(
        f"A sixteenth at a time: dim {r['config']['dim']}, {r['config']['layers']} layers, "
        f"{r['dtype']}, {r['threads']} threads, {r['cpu']}, torch {r['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
