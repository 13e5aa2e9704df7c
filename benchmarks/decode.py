"""Decoding one token at a time, as the context grows: microseconds a token.

    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --dtype bfloat16

fastpe's step on its state, the same in plain PyTorch, and softmax attention over a cache of keys
and values, all timed in turn in one process per encoding and context; on a GPU each backend that
it has, and everything as a CUDA graph too. Writes DIR/decode.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import cases
import devices
import options
import report
import torch
from harness import TOLERANCE, Setup, alternate, environment, relative_error, spread
from isolated import runner
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastpe

STEPS = 64
# name: (encoding, positions of the piece)
ENCODINGS: dict[str, tuple[cases.MakeEncoding | None, str | None]] = {
    "no encoding": (None, None),
    "RoPE": (cases.rope, None),
    "RoPEPool": (cases.ropepool, None),
    "SineSPE": (cases.sinespe, None),
    "F-StrIPE:SFF": (cases.fstripe_sff, "chord"),
    "F-StrIPE pooled": (cases.fstripe_pooled, "chord"),
}


class Decoder:
    """The state after a context, and the steps that go on from it."""

    def __init__(self, setup: Setup, name: str) -> None:
        torch.manual_seed(0)
        make, field = ENCODINGS[name]
        self.context = setup.length - STEPS
        self.encoding: nn.Module | None = None
        if make:
            self.encoding = make(setup.head_dim, setup.heads).to(setup.device).eval()
        self.where = None
        if field:
            self.where = torch.from_numpy(getattr(setup.piece(), field)).to(setup.device)
        self.q, self.k, self.v = setup.inputs()

    def prefill(self, length: int, backend: str) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return output and state of the first `length` tokens."""
        return fastpe.causal_linear_attention(
            *(x[:, :length] for x in (self.q, self.k, self.v)),
            pos_encoding=self.encoding,
            positions=None if self.where is None else self.where[:length],
            output_final_state=True,
            backend=backend,
        )

    def steps(self, backend: str) -> Callable[[], Tensor]:
        """Return a call that decodes the last STEPS tokens and returns their outputs."""
        start = self.prefill(self.context, backend)[1]
        # what a model has at hand: one token's projections, one position
        tokens = [
            (*(x[:, t] for x in (self.q, self.k, self.v)), None if self.where is None else w)
            for t, w in zip(range(self.context, self.context + STEPS), self._where(), strict=True)
        ]

        def run() -> Tensor:
            state, outputs = start, []
            with torch.no_grad():
                for q, k, v, position in tokens:
                    o, state = fastpe.causal_linear_attention_step(
                        q,
                        k,
                        v,
                        state,
                        pos_encoding=self.encoding,
                        positions=position,
                        backend=backend,
                    )
                    outputs.append(o)
            return torch.stack(outputs, 1)

        return run

    def _where(self) -> list[Tensor | None]:
        last = slice(self.context, self.context + STEPS)
        return [None] * STEPS if self.where is None else list(self.where[last])

    def cached_softmax(self) -> Callable[[], Tensor]:
        """Return the same for softmax attention over a cache of keys and values, [B, H, T, D]."""
        cache_k, cache_v = (x.transpose(1, 2).contiguous() for x in (self.k, self.v))
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))

        def run() -> Tensor:
            outputs = []
            with torch.no_grad():
                for t in range(self.context, self.context + STEPS):
                    cache_k[:, :, t], cache_v[:, :, t] = k[:, :, t], v[:, :, t]
                    outputs.append(
                        F.scaled_dot_product_attention(
                            q[:, :, t : t + 1], cache_k[:, :, : t + 1], cache_v[:, :, : t + 1]
                        )
                    )
            return torch.cat(outputs, 2)

        return run


def backends(setup: Setup) -> dict[str, str]:
    """Return {provider: backend}: on a GPU every one that runs there, unless one was asked for."""
    if setup.device == "cpu" or setup.backend != "auto":
        return {"fastpe": setup.backend}
    found = [n for n, reason in fastpe.available_backends().items() if reason is None]
    return {f"fastpe {n}": n for n in found if n not in ("cpu", "reference")}


def measure(setup: Setup, name: str, seconds: float) -> dict:
    """Return {provider: times of STEPS tokens in ms}, after a check of the steps."""
    torch.set_num_threads(setup.threads)
    decoder = Decoder(setup, name)
    with torch.no_grad():
        full = decoder.prefill(setup.length, "reference")[0][:, -STEPS:]
        calls = {provider: decoder.steps(b) for provider, b in backends(setup).items()}
        calls["PyTorch step"] = decoder.steps("reference")
    known = list(calls)
    calls["softmax, KV cache"] = decoder.cached_softmax()
    if setup.device != "cpu":
        for provider in [p for p in calls if p != "PyTorch step"]:
            try:
                calls[f"{provider}, graph"] = devices.graphed(calls[provider])
            except RuntimeError as error:
                print(f"{name}, {provider}: no graph: {error}".splitlines()[0], file=sys.stderr)
                continue
            known += [f"{provider}, graph"] * (provider in known)
    for provider in known:
        error = relative_error(calls[provider](), full)
        if not error <= TOLERANCE[setup.dtype][0]:
            raise ArithmeticError(f"{provider}: relative error {error:.1e} against one forward")
    return {p: spread(t) for p, t in alternate(calls, setup.device, seconds).items()}


def main() -> int:
    """Run the benchmark; return 1 if a row was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    options.add(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repeats of a row")
    args = parser.parse_args()
    options.check(parser, args, "contexts")
    isolated, records = runner(args.device), []
    for name, context in tqdm([(n, c) for n in ENCODINGS for c in args.contexts], unit="row"):
        setup = options.setup(args, context + STEPS)
        found = asdict(setup) | environment(setup)
        record = {"row": name, "context": context, **found}
        result = isolated(measure, setup, name, args.seconds)
        records.append(
            record | ({"error": result["error"]} if "error" in result else {"ms": result})
        )
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record | {"steps": STEPS}) for record in records]
    (args.out / "decode.jsonl").write_text("\n".join(lines) + "\n")
    print(table(records))
    return int(any("error" in record for record in records))


def table(records: list[dict]) -> str:
    """Return microseconds a token, in markdown."""
    providers = list(dict.fromkeys(p for r in records for p in r.get("ms", ())))
    lines = [["encoding", "context", *(f"{p}, us" for p in providers)]]
    for r in records:
        if "error" in r:
            cells = ["error"] * len(providers)
        else:
            times = [r["ms"].get(p) for p in providers]
            cells = [report.brief(1e3 * t["median"] / STEPS) if t else "none" for t in times]
        lines.append([r["row"], str(r["context"]), *cells])
    errors = [f"- {r['row']}, {r['context']}: {r['error']}" for r in records if "error" in r]
    return "\n".join([report.markdown(lines), *errors, "", report.describe(records[-1])])


if __name__ == "__main__":
    sys.exit(main())
