"""Training from one checkpoint to the next."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastpe_lab import checks

from .evaluation import fit_threshold
from .model import Config, Model, nats, saved_config
from .windows import Window, Windows


@dataclass(frozen=True)
class Budget:
    """How a model is trained.

    Args:
        steps: Number of updates.
        batch: Windows a step.
        bars: number of bars in a window.
        lr: Peak of the learning rate, which rises over a tenth of the steps and falls to zero as a
            cosine.
        position_lr: factor on lr for the parameters of encodings.
        seed: seed of parameters, noise and windows.
        data: name of the training data.
    """

    steps: int = 300
    batch: int = 8
    bars: int = 16
    lr: float = 2e-3
    position_lr: float = 1.0
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "bars", "lr", "position_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


class Trainer:
    """A model on its way through a budget.

    Which windows a step sees and which noise it has follow from the seed and the step alone, so
    that a training that was cut off goes on as if it had not been.

    Args:
        config: configuration of the model.
        budget: budget of the training.
    """

    def __init__(self, config: Config, budget: Budget) -> None:
        torch.manual_seed(budget.seed)
        self.config, self.budget = config, budget
        self.model = Model(config)
        positional, rest = [], []
        for name, parameter in self.model.named_parameters():
            (positional if "pos_encoding" in name else rest).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": positional, "lr": budget.lr * budget.position_lr}],
            lr=budget.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _warm_cosine(step, budget.steps)
        )
        self.step, self.losses = 0, []
        # probability above which a key sounds, known at the end
        self.threshold: float | None = None

    def update(self, window: Window) -> float:
        """Take one step on a batch; return its loss in nats a sixteenth."""
        self.model.train()
        logits, _ = self.model(window.inputs, window.positions)
        loss = sum(x.mean() for x in nats(logits, window.target)) + self.model.auxiliary_loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def train(self, windows: Windows, checkpoint: Path | None = None, quiet: bool = False) -> bool:
        """Go on to the end of the budget; return whether it was reached.

        Ctrl-C and SIGTERM end it after the step that is being taken.

        Args:
            windows: To train on.
            checkpoint: Written every 50 steps, at the end, and where it is stopped.
            quiet: Show no progress.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        b = self.budget
        progress = tqdm(
            initial=self.step, total=b.steps, unit="step", dynamic_ncols=True, disable=quiet
        )
        with progress, _interrupts() as interrupted:
            while self.step < b.steps and not interrupted:
                generator = np.random.default_rng((b.seed, self.step))
                loss = self.update(windows.random(b.batch, b.bars, generator))
                if not math.isfinite(loss):
                    raise ArithmeticError(f"the loss of step {self.step} is {loss}")
                progress.set_description(f"loss {loss:.3f}")
                progress.update()
                if checkpoint and self.step % 50 == 0:
                    self.save(checkpoint)
        if self.step == b.steps:
            self.threshold = fit_threshold(self.model, windows, b.bars)
        if checkpoint:
            self.save(checkpoint)
        return self.step == b.steps

    def save(self, path: Path) -> None:
        """Write a checkpoint, in one piece or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        content = {"config": asdict(self.config), "budget": asdict(self.budget)}
        content |= {name: getattr(self, name) for name in _NUMBERS}
        content |= {name: getattr(self, name).state_dict() for name in _PARTS}
        torch.save(content, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of another configuration or budget, or no checkpoint.
        """
        self._take(read(path), path)

    def _take(self, content: dict, path: Path) -> None:
        was = content["config"] | content["budget"]
        wanted = asdict(self.config) | asdict(self.budget)
        others = [key for key in was | wanted if was.get(key) != wanted.get(key)]
        if others:
            made, got = (
                ", ".join(f"{key} = {x.get(key)!r}" for key in others) for x in (was, wanted)
            )
            raise ValueError(f"{path} was made with {made}, got {got}")
        checks.within(f"step of {path}", content["step"], 0, self.budget.steps)
        for name in _NUMBERS:
            setattr(self, name, content[name])
        for name in _PARTS:
            try:
                getattr(self, name).load_state_dict(content[name])
            except Exception as error:
                raise ValueError(
                    f"{name} of {path} does not fit: {checks.reason(error)}"
                ) from error


_PARTS = {"model": dict, "optimizer": dict, "schedule": dict}
_NUMBERS = {"step": int, "losses": list, "threshold": (float, type(None))}


def read(path: Path) -> dict:
    """Return the content of a checkpoint.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist; train first")
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        # torch's message would advise to load it without a check
        raise ValueError(f"{path} is no checkpoint of this program") from error
    try:
        checks.record(content, {"config": dict, "budget": dict, **_NUMBERS, **_PARTS})
        for loss in content["losses"]:
            checks.typed("losses", loss, float)
        if content["threshold"] is not None:
            checks.within("threshold", content["threshold"], 0, 1)
        saved_config(content["config"], content["model"])
        checks.made(Budget, content["budget"], "budget")
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of this program: {error}") from error
    return content


def restore(path: Path) -> Trainer:
    """Return the training that a checkpoint holds."""
    content = read(path)
    trainer = Trainer(Config(**content["config"]), Budget(**content["budget"]))
    trainer._take(content, path)
    return trainer


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect signals to stop, so that none comes in the middle of a step; a second one does."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone gets signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
