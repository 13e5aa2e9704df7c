"""Decoding one token at a time as the context grows: microseconds a token, tokens a second.

    python benchmarks/decode.py --quick    less than a minute on two cores
    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --dtype bfloat16

Measures the attention alone, and the layer with its projections. Each row times in turn, in one
process, fastpe's step on its state, the same step in plain PyTorch, and softmax attention with a
cache of keys and values. A GPU adds each of its backends, and all of this as CUDA graphs. Writes
DIR/decode.jsonl and DIR/decode.png.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict

import report
import torch
from cases import ours
from timing import command
from timing.isolated import runner
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastpe
from fastpe_lab.clocks import TOLERANCE, alternate, relative_error, spread
from fastpe_lab.records import Setup, brief, describe, environment, markdown

STEPS = 64
LEVELS = ("attention", "layer")
SOFTMAX = "softmax, KV cache"
# {case of report.COLOURS: (label, encoding, field of the piece with the positions)}
ENCODINGS: dict[str, tuple[str, ours.MakeEncoding | None, str | None]] = {
    "fastpe": ("no encoding", None, None),
    "fastpe-rope": ("RoPE", ours.rope, None),
    "fastpe-ropepool": ("RoPEPool", ours.ropepool, None),
    "fastpe-sinespe": ("SineSPE", ours.sinespe, None),
    "fastpe-fstripe-sff": ("F-StrIPE:SFF", ours.fstripe_sff, "chord"),
    "fastpe-fstripe-pooled": ("F-StrIPE pooled", ours.fstripe_pooled, "chord"),
}


class Attention:
    """The attention alone: the state after a context, and the steps that go on from it."""

    def __init__(self, setup: Setup, name: str) -> None:
        torch.manual_seed(0)
        _, make, field = ENCODINGS[name]
        self.context = setup.length - STEPS
        self.encoding: nn.Module | None = None
        if make:
            self.encoding = make(setup.head_dim, setup.heads).to(setup.device).eval()
        self.where = None
        if field:
            self.where = torch.from_numpy(getattr(setup.piece(), field)).to(setup.device)
        self.inputs = setup.inputs()

    def prefill(self, length: int, backend: str) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return output and state of the first `length` tokens."""
        where = None if self.where is None else self.where[:length]
        return self._prefill(*(x[:, :length] for x in self.inputs), backend, positions=where)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, backend: str, **where: Tensor | None
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        options = {"pos_encoding": self.encoding, "output_final_state": True, "backend": backend}
        return fastpe.causal_linear_attention(q, k, v, **options, **where)

    def _step(
        self, *token_and_state: object, backend: str, **where: Tensor | None
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        options = {"pos_encoding": self.encoding, "backend": backend}
        return fastpe.causal_linear_attention_step(*token_and_state, **options, **where)

    def steps(self, backend: str) -> Callable[[], Tensor]:
        """Return a call that decodes the last STEPS tokens and returns their outputs."""
        start = self.prefill(self.context, backend)[1]
        # a model has the inputs and the position of one token at hand
        last = range(self.context, self.context + STEPS)
        tokens = [tuple(x[:, t] for x in self.inputs) for t in last]
        where = [None] * STEPS if self.where is None else list(self.where[self.context :])

        def run() -> Tensor:
            state, outputs = start, []
            with torch.no_grad():
                for token, position in zip(tokens, where, strict=True):
                    o, state = self._step(*token, state, backend=backend, positions=position)
                    outputs.append(o)
            return torch.stack(outputs, 1)

        return run

    def _project(self, *x: Tensor) -> tuple[Tensor, ...]:
        # inputs [B, T, .] to q, k, v [B, H, T, D], contiguous
        return tuple(y.transpose(1, 2).contiguous() for y in x)

    def _output(self, o: Tensor) -> Tensor:
        # o [B, H, T, D] to the output [B, T, .]
        return o.transpose(1, 2)

    def cached_softmax(self) -> Callable[[], Tensor]:
        """Return the same call for softmax attention with a cache of keys and values."""
        _, cache_k, cache_v = self._project(*self.inputs)
        last = range(self.context, self.context + STEPS)
        tokens = [[x[:, t : t + 1] for x in self.inputs] for t in last]

        def run() -> Tensor:
            outputs = []
            with torch.no_grad():
                for t, token in zip(last, tokens, strict=True):
                    q, cache_k[:, :, t : t + 1], cache_v[:, :, t : t + 1] = self._project(*token)
                    known = cache_k[:, :, : t + 1], cache_v[:, :, : t + 1]
                    o = F.scaled_dot_product_attention(q, *known)
                    outputs.append(self._output(o))
            return torch.cat(outputs, 1)

        return run

    def softmax(self) -> Tensor:
        """Return softmax attention for the last STEPS tokens, from its formula."""
        q, k, v = self._project(*self.inputs)
        logits = q[:, :, -STEPS:] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(self.context + 1)
        return self._output(logits.masked_fill(future, -math.inf).softmax(-1) @ v)


class Layer(Attention):
    """fastpe.nn.CausalLinearAttention; softmax attention shares its projections."""

    def __init__(self, setup: Setup, name: str) -> None:
        super().__init__(setup, name)
        width = setup.heads * setup.head_dim
        self.layer = fastpe.nn.CausalLinearAttention(
            width,
            setup.heads,
            pos_encoding=self.encoding,
            device=setup.device,
            dtype=self.inputs[0].dtype,
        ).eval()
        self.inputs = (self.inputs[0].flatten(2),)

    def _prefill(
        self, x: Tensor, backend: str, **where: Tensor | None
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        self.layer.backend = backend
        return self.layer(x, output_final_state=True, **where)

    def _step(
        self, *token_and_state: object, backend: str, **where: Tensor | None
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        self.layer.backend = backend
        return self.layer.step(*token_and_state, **where)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.layer.in_proj(x).unflatten(-1, (3, self.layer.num_heads, -1)).unbind(2)
        return super()._project(q, k, v)

    def _output(self, o: Tensor) -> Tensor:
        return self.layer.out_proj(super()._output(o).flatten(2))


def backends(setup: Setup) -> dict[str, str]:
    """Return {provider: backend}; on a GPU without --backend, every backend that runs there."""
    if setup.device == "cpu" or setup.backend != "auto":
        return {"fastpe": setup.backend}
    reasons = fastpe.available_backends()
    found = [n for n, why in reasons.items() if why is None and n not in ("cpu", "reference")]
    if not found:
        raise RuntimeError(f"no kernels run on {setup.device}: {reasons}")
    return {f"fastpe {n}": n for n in found}


def measure(setup: Setup, name: str, level: str, seconds: float) -> dict:
    """Return {provider: times of STEPS tokens in ms}, after a comparison of the steps."""
    torch.set_num_threads(setup.threads)
    decoder = {"attention": Attention, "layer": Layer}[level](setup, name)
    with torch.no_grad():
        full = decoder.prefill(setup.length, "reference")[0][:, -STEPS:]
        calls = {provider: decoder.steps(b) for provider, b in backends(setup).items()}
        calls["PyTorch step"] = decoder.steps("reference")
        wanted = dict.fromkeys(calls, full) | {SOFTMAX: decoder.softmax()}
        calls[SOFTMAX] = decoder.cached_softmax()
    if setup.device != "cpu":
        for provider in [p for p in calls if p != "PyTorch step"]:
            try:
                calls[f"{provider}, graph"] = graphed(calls[provider])
            except RuntimeError as error:
                print(f"{name}, {provider}: no graph: {error}".splitlines()[0], file=sys.stderr)
                continue
            wanted[f"{provider}, graph"] = wanted[provider]
    for provider, o in wanted.items():
        error = relative_error(calls[provider](), o)
        if not error <= TOLERANCE[setup.dtype][0]:
            raise ArithmeticError(f"{provider}: relative error {error:.1e} against one forward")
    return {p: spread(t) for p, t in alternate(calls, setup.device, seconds).items()}


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call that replays a CUDA graph; each replay overwrites the last output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a row was wrong or failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", help="default 256 to 16384")
    parser.add_argument("--levels", choices=LEVELS, nargs="+", default=LEVELS)
    parser.add_argument("--quick", action="store_true", help="short contexts, fewer repeats")
    parser.add_argument("--seconds", type=float, help="for the repeats of a row, default 1")
    args = parser.parse_args(argv)
    args.contexts = args.contexts or ([256, 1024] if args.quick else [256, 1024, 4096, 16384])
    args.seconds = args.seconds or (0.1 if args.quick else 1.0)
    command.check(parser, args, "contexts")
    isolated, records = runner(args.device), []
    lines = command.Lines(args.out / "decode.jsonl")
    rows = [(n, c, level) for level in args.levels for n in ENCODINGS for c in args.contexts]
    for name, context, level in tqdm(rows, unit="row"):
        setup = command.setup(args, context + STEPS)
        record = {"case": name, "row": ENCODINGS[name][0], "level": level, "context": context}
        record |= {"steps": STEPS} | asdict(setup) | environment(setup)
        found = isolated(measure, setup, name, level, args.seconds)
        records.append(lines.write(record | (found if "error" in found else {"ms": found})))
    print("\n\n".join(table(records, level) for level in args.levels))
    report.plot_decoding(records, lines.path.with_suffix(".png"))
    return int(any("error" in record for record in records))


def table(records: list[dict], level: str) -> str:
    """Return microseconds a token at a level, in markdown."""
    records = [r for r in records if r["level"] == level]
    providers = list(dict.fromkeys(p for r in records for p in r.get("ms", ())))
    lines = [[level, "context", *(f"{p}, us" for p in providers)]]
    for r in records:
        if "error" in r:
            cells = ["error"] * len(providers)
        else:
            times = [r["ms"].get(p) for p in providers]
            cells = [brief(1e3 * t["median"] / STEPS) if t else "none" for t in times]
        lines.append([r["row"], str(r["context"]), *cells])
    errors = command.errors(records, "row", "context")
    return "\n".join([markdown(lines), *errors, "", describe(records[-1])])


if __name__ == "__main__":
    sys.exit(main())
