"""The literature's systems (`fastpe_lab.baselines`) as rows.

The row "sdpa" stands for softmax attention. Each system is compared with its own float64 copy
before it is timed. tests/benchmarks/test_baselines.py checks that the copies follow the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from fastpe_lab.baselines import BASELINES, Baseline
from fastpe_lab.records import Setup

from .case import Case, Model


def build(baseline: Baseline) -> Callable[[Setup, int | None], Model]:
    """Return the builder of a baseline. Structure labels are the chords of the piece.

    The gradient of an auxiliary loss counts too: the output carries it without a change of value.
    """

    def made(setup: Setup, variant: int | None) -> Model:
        torch.manual_seed(0)
        bound = {"max_len": setup.length} if baseline.bounded else {}
        module = baseline.make(setup.head_dim, setup.heads, **bound).to(setup.device).eval()
        wide = deepcopy(module).double()
        if setup.dtype == "float64":
            module.double()
        where = None
        if baseline.structured:
            where = torch.from_numpy(setup.piece().chord).to(setup.device)

        def run(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = module(q, k, v, positions=None if where is None else where[: q.shape[1]])
            loss = getattr(module, "auxiliary_loss", None)
            if loss is not None and loss.requires_grad:
                o = o + (loss - loss.detach())
            return o

        return Model(
            forward=lambda q, k, v: run(module, q, k, v),
            reference=lambda q, k, v: run(wide, q, k, v),
            parameters=list(module.parameters()),
            reference_parameters=list(wide.parameters()),
        )

    return made


LITERATURE: dict[str, Case] = {
    name: Case(
        baseline.label if baseline.causal else f"{baseline.label} (bidirectional)",
        build(baseline),
        quadratic=baseline.quadratic_time,
        quadratic_memory=baseline.quadratic_memory,
        causal=baseline.causal,
    )
    for name, baseline in BASELINES.items()
    if name != "softmax"
}
