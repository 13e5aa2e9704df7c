"""The rows of the benchmark: fastpe's encodings on the music's positions, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from baseline_cases import BASELINE_CASES
from gpu_peers import GPU_PEERS
from harness import Case, Model, Setup
from peers import NUM_REALIZATIONS, NUM_SINES, PEERS
from torch import Tensor, nn

import fastpe

MakeEncoding = Callable[[int, int], nn.Module]


def attention(
    make: MakeEncoding | None = None, positions: str | None = None, favor: bool = False
) -> Callable[[Setup, int | None], Model]:
    """Return the builder of fastpe's attention with an encoding.

    Args:
        make: head_dim, num_heads to the encoding.
        positions: Field of the piece that holds the positions; default 0, 1, 2, ...
        favor: FAVOR+ of 128 features instead of elu1.
    """

    def build(setup: Setup, variant: int | None) -> Model:
        torch.manual_seed(0)
        encoding = make(setup.head_dim, setup.heads).to(setup.device).eval() if make else None
        wide = deepcopy(encoding).double() if encoding else None
        if encoding and setup.dtype == "float64":
            encoding.double()
        psi = fastpe.Favor(128, seed=0).to(setup.device).eval() if favor else "elu1"
        where = None
        if positions:
            where = torch.from_numpy(getattr(setup.piece(), positions)).to(setup.device)

        def run(
            q: Tensor, k: Tensor, v: Tensor, encoding: nn.Module | None, backend: str
        ) -> Tensor:
            here = None if where is None else where[: q.shape[1]]
            return fastpe.causal_linear_attention(
                *(q, k, v),
                pos_encoding=encoding,
                positions=here,
                feature_map=psi,
                backend=backend,
            )

        return Model(
            forward=lambda q, k, v: run(q, k, v, encoding, setup.backend),
            reference=lambda q, k, v: run(q, k, v, wide, "reference"),
            parameters=list(encoding.parameters()) if encoding else [],
            reference_parameters=list(wide.parameters()) if wide else [],
            # nothing to redraw where there is no noise
            redraw=getattr(encoding, "resample_", lambda: None),
        )

    return build


def rope(head_dim: int, num_heads: int) -> nn.Module:
    """Return RoPE with fixed frequencies, in the numerator."""
    return fastpe.RoPE(head_dim, num_heads)


def ropepool(head_dim: int, num_heads: int) -> nn.Module:
    """Return RoPEPool with learned frequencies."""
    return fastpe.RoPEPool(head_dim, num_heads)


def sinespe(head_dim: int, num_heads: int) -> nn.Module:
    """Return gated SineSPE with the noise of the peers."""
    return fastpe.SineSPE(
        head_dim, num_heads, num_sines=NUM_SINES, num_realizations=NUM_REALIZATIONS, seed=0
    )


def fstripe_sff(head_dim: int, num_heads: int, num_levels: int = 1) -> nn.Module:
    """Return F-StrIPE:SFF, as many sines and realisations as SineSPE."""
    return fastpe.FStripe(
        head_dim,
        num_heads,
        num_levels=num_levels,
        num_sines=NUM_SINES,
        num_realizations=NUM_REALIZATIONS,
        seed=0,
    )


def fstripe_chroma(head_dim: int, num_heads: int) -> nn.Module:
    """Return F-StrIPE:SFF of twelve-component positions."""
    return fstripe_sff(head_dim, num_heads, num_levels=12)


def fstripe_pooled(head_dim: int, num_heads: int) -> nn.Module:
    """Return the published F-StrIPE, 64 features."""
    return fastpe.FStripe(head_dim, num_heads)


def fstripe_unpooled(head_dim: int, num_heads: int) -> nn.Module:
    """Return exact F-StrIPE of one sine, 2 D features."""
    return fastpe.FStripe(head_dim, num_heads, pool=False)


OURS: dict[str, Case] = {
    "fastpe": Case("no encoding", attention(), ours=True),
    "fastpe-rope": Case("RoPE", attention(rope), ours=True),
    "fastpe-ropepool": Case("RoPEPool", attention(ropepool), ours=True),
    "fastpe-sinespe": Case("SineSPE", attention(sinespe), ours=True),
    "fastpe-favor": Case("FAVOR+", attention(favor=True), ours=True),
    "fastpe-spe-favor": Case("SineSPE, FAVOR+", attention(sinespe, favor=True), ours=True),
    "fastpe-fstripe-sff": Case("F-StrIPE:SFF, chords", attention(fstripe_sff, "chord"), ours=True),
    "fastpe-fstripe-chroma": Case(
        "F-StrIPE:SFF, chroma", attention(fstripe_chroma, "chroma"), ours=True
    ),
    "fastpe-fstripe-pooled": Case("F-StrIPE pooled", attention(fstripe_pooled, "chord"), ours=True),
    "fastpe-fstripe-unpooled": Case(
        "F-StrIPE unpooled", attention(fstripe_unpooled, "chord"), ours=True
    ),
}

CASES: dict[str, Case] = {**PEERS, **OURS, **BASELINE_CASES}
GPU_CASES: dict[str, Case] = {**PEERS, **GPU_PEERS, **OURS, **BASELINE_CASES}
# {device: where `harness.find` finds its cases}
TABLES = {"cpu": "cases.CASES", "cuda": "cases.GPU_CASES"}
