"""Cases timed in turn in this process, at several widths, each after a comparison with float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import cases
import torch
from torch import Tensor

from fastpe_lab.clocks import alternate, spread
from fastpe_lab.records import Setup, environment

from .command import Lines
from .isolated import InProcess
from .measure import call, check, output_gradient
from .memory import measure_memory

# case and head dim
Key = tuple[str, int]


class Bench:
    """Measures on one device in this process, and writes every record at once.

    Args:
        setup: sizes; its head_dim is the usual one, its length is not used.
        seconds: time to spend on functions that are timed in turn.
        gate: number of tokens for the comparison with float64.
        path: file for the records.
    """

    def __init__(self, setup: Setup, seconds: float, gate: int, path: Path) -> None:
        self.setup, self.seconds, self.gate = setup, seconds, gate
        self.cases, self.lines = cases.of_device(setup.device), Lines(path)
        self.run = InProcess(setup.device)
        self._checked: dict[Key, str | None] = {}

    def record(self, kind: str, **fields: object) -> None:
        """Write a record with its setup and machine."""
        self.lines.write({"kind": kind} | asdict(self.setup) | environment(self.setup) | fields)

    def wrong(self, name: str, head_dim: int) -> str | None:
        """Return why a case cannot be timed at this width, or None if it is right."""
        if (name, head_dim) not in self._checked:
            setup = replace(self.setup, head_dim=head_dim, length=self.gate)
            reason = self.cases[name].unavailable(setup)
            if not reason:
                found = self.run(check, name, setup, self.gate)
                self.record("check", case=name, head_dim=head_dim, length=self.gate, **found)
                reason = found.get("error")
            if reason:
                print(f"{name}, D={head_dim}: {reason}", file=sys.stderr, flush=True)
            self._checked[name, head_dim] = reason
        return self._checked[name, head_dim]

    def turns(
        self, keys: list[Key], length: int, mode: str, host: bool = False
    ) -> dict[Key, float | str]:
        """Return {(case, head dim): median milliseconds, or why there are none}.

        Args:
            keys: cases and head dims to time in turn.
            length: T.
            mode: forward or forward+backward.
            host: whether times on a GPU include the launch.
        """
        result: dict[Key, float | str] = {}
        calls: dict[Key, Callable[[], Tensor]] = {}
        inputs: dict[int, tuple[Tensor, ...]] = {}
        for key in keys:
            found = {"error": self.wrong(*key)}
            if not found["error"]:
                found = self.run(self._prepare, key, length, mode, inputs)
            if "call" in found:
                calls[key] = found["call"]
            result[key] = found.get("error", "not timed")
        times = self.run(alternate, calls, self.setup.device, self.seconds, host) if calls else {}
        for key in keys:
            fields = {"case": key[0], "head_dim": key[1], "length": length, "mode": mode}
            if key in times:
                ms = spread(times[key])
                result[key] = ms["median"]
                self.record("time", **fields, host=host, ms=ms)
            else:
                if key in calls:
                    result[key] = times["error"]
                self.record("time", **fields, host=host, error=result[key])
        text = ", ".join(
            f"{n} {t if isinstance(t, str) else f'{t:.3g}'}" for (n, _), t in result.items()
        )
        print(f"T={length} D={keys[0][1]} {mode}, ms: {text}", file=sys.stderr, flush=True)
        return result

    def _prepare(self, key: Key, length: int, mode: str, inputs: dict) -> dict:
        name, width = key
        setup = replace(self.setup, head_dim=width, length=length)
        if width not in inputs:
            inputs[width] = gaussian(setup)
        case = self.cases[name]
        model = case.build(setup, case.variants[-1])
        measured = call(model, inputs[width][:3], mode, inputs[width][3])
        # a case that exceeds the memory, or is wrong at this length, fails here, alone
        if not bool(measured().isfinite().all()):
            raise ArithmeticError("the output is not finite")
        return {"call": measured}

    def memory(self, name: str, length: int, mode: str) -> float | str:
        """Return the extra peak megabytes of a case, or why there are none."""
        reason = self.wrong(name, self.setup.head_dim)
        found: dict = {"error": reason}
        if not reason:
            variant = self.cases[name].variants[-1]
            setup = replace(self.setup, length=length)
            found = self.run(measure_memory, name, setup, mode, variant)
        self.record("memory", case=name, length=length, mode=mode, **found)
        return found.get("error") or found["extra_mb"]


def gaussian(setup: Setup) -> tuple[Tensor, ...]:
    """Return q, k, v and a gradient of the output, [B, T, H, D], standard normal."""
    generator = torch.Generator(setup.device).manual_seed(0)
    shape = setup.batch, setup.length, setup.heads, setup.head_dim
    options = {"dtype": getattr(torch, setup.dtype), "device": setup.device}
    made = [torch.randn(shape, generator=generator, **options) for _ in range(3)]
    return *made, output_gradient(made[2])


def ratio(times: dict, slow: Key, fast: Key) -> tuple[float | None, str]:
    """Return how many times as long the first key took as the second, or None and the reason."""
    for key in (slow, fast):
        if isinstance(times[key], str):
            return None, f"{key[0]}: {times[key]}"
    return times[slow] / times[fast], ""
