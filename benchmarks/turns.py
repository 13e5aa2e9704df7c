"""Cases timed in turn in this process, at several widths, each after a comparison with float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cases import TABLES
from harness import Setup, alternate, call, check, environment, find, output_gradient, spread
from isolated import InProcess
from memory import measure_memory
from torch import Tensor

# case and head dim
Key = tuple[str, int]


class Bench:
    """Measures on one device in this process, and writes every record.

    Args:
        setup: Sizes but for the length; its head_dim is that of most cases.
        seconds: For the repeats of what is timed in turn.
        gate: Tokens of the comparison with float64.
        path: Gets every record as a line of JSON at once: what is cut short has its times.
    """

    def __init__(self, setup: Setup, seconds: float, gate: int, path: Path) -> None:
        self.setup, self.seconds, self.gate, self.path = setup, seconds, gate, path
        self.table = TABLES[setup.device]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.run = InProcess(setup.device)
        self._checked: dict[Key, str | None] = {}

    def record(self, kind: str, **what: object) -> None:
        """Write a record, with what it was measured on."""
        self.write({"kind": kind} | asdict(self.setup) | environment(self.setup) | what)

    def write(self, record: dict) -> None:
        """Append a line to the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def wrong(self, name: str, head_dim: int) -> str | None:
        """Return why a case is not to be timed at this width, or None if it is right."""
        if (name, head_dim) not in self._checked:
            setup = replace(self.setup, head_dim=head_dim, length=self.gate)
            reason = find(self.table, name).unavailable(setup)
            if not reason:
                found = self.run(check, self.table, name, setup, self.gate)
                self.record("check", case=name, head_dim=head_dim, length=self.gate, **found)
                reason = found.get("error")
            if reason:
                print(f"{name}, D={head_dim}: {reason}", file=sys.stderr, flush=True)
            self._checked[name, head_dim] = reason
        return self._checked[name, head_dim]

    def turns(
        self, keys: list[Key], length: int, mode: str, host: bool = False
    ) -> dict[Key, float | str]:
        """Return the median milliseconds of {(case, head dim)} timed in turn, or why there is none.

        Args:
            keys: What to time.
            length: T.
            mode: Forward or forward+backward.
            host: Count the time to launch too.
        """
        reasons = {key: self.wrong(*key) for key in keys}
        calls: dict[Key, Callable[[], Tensor]] = {}
        inputs: dict[int, tuple[Tensor, ...]] = {}
        for key in [key for key, reason in reasons.items() if not reason]:
            found = self.run(self._prepare, key, length, mode, inputs)
            reasons[key] = found.get("error")
            if not reasons[key]:
                calls[key] = found["call"]
        times = self.run(alternate, calls, self.setup.device, self.seconds, host) if calls else {}
        if "error" in times:
            reasons |= dict.fromkeys(calls, times["error"])
        result: dict[Key, float | str] = {}
        for key, reason in reasons.items():
            what = {"case": key[0], "head_dim": key[1], "length": length, "mode": mode}
            if reason:
                result[key] = reason
                self.record("time", **what, host=host, error=reason)
            else:
                ms = spread(times[key])
                result[key] = ms["median"]
                self.record("time", **what, host=host, ms=ms)
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
        case = find(self.table, name)
        model = case.build(setup, case.variants[-1])
        measured = call(model, inputs[width][:3], mode, inputs[width][3])
        # what does not fit in memory, or is not right at this length, fails here, alone
        if not bool(measured().isfinite().all()):
            raise ArithmeticError("the output is not finite")
        return {"call": measured}

    def memory(self, name: str, length: int, mode: str) -> float | str:
        """Return the extra peak megabytes of a case, or why there are none."""
        reason = self.wrong(name, self.setup.head_dim)
        found: dict = {"error": reason}
        if not reason:
            setup = replace(self.setup, length=length)
            variant = find(self.table, name).variants[-1]
            found = self.run(measure_memory, self.table, name, setup, mode, variant)
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
    """Return how many times as long one took as the other, and why there is no such number."""
    for key in (slow, fast):
        if isinstance(times[key], str):
            return None, f"{key[0]}: {times[key]}"
    return times[slow] / times[fast], ""
