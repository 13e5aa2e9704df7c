"""fastpe's attention with each encoding, on the music's positions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

import fastpe
from fastpe_lab.records import Setup

from .case import Case, Model
from .peers import NUM_REALIZATIONS, NUM_SINES

# head dim and number of heads to the encoding
MakeEncoding = Callable[[int, int], nn.Module]


def attention(
    make: MakeEncoding | None = None, positions: str | None = None, favor: bool = False
) -> Callable[[Setup, int | None], Model]:
    """Return the builder of fastpe's attention with an encoding.

    Args:
        make: function that makes the encoding.
        positions: field of the piece that holds the positions; None for 0, 1, 2, ...
        favor: whether the feature map is FAVOR+ with 128 features instead of elu1.
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
            options = {"pos_encoding": encoding, "positions": here, "feature_map": psi}
            return fastpe.causal_linear_attention(q, k, v, **options, backend=backend)

        return Model(
            forward=lambda q, k, v: run(q, k, v, encoding, setup.backend),
            reference=lambda q, k, v: run(q, k, v, wide, "reference"),
            parameters=list(encoding.parameters()) if encoding else [],
            reference_parameters=list(wide.parameters()) if wide else [],
            # an encoding without noise has no such method
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
    """Return gated SineSPE with as much noise as the peers."""
    sizes = {"num_sines": NUM_SINES, "num_realizations": NUM_REALIZATIONS}
    return fastpe.SineSPE(head_dim, num_heads, **sizes, seed=0)


def fstripe_sff(head_dim: int, num_heads: int, num_levels: int = 1) -> nn.Module:
    """Return F-StrIPE:SFF with as many sines and realisations as SineSPE."""
    sizes = {"num_sines": NUM_SINES, "num_realizations": NUM_REALIZATIONS}
    return fastpe.FStripe(head_dim, num_heads, num_levels=num_levels, **sizes, seed=0)


def fstripe_chroma(head_dim: int, num_heads: int) -> nn.Module:
    """Return F-StrIPE:SFF for positions of twelve components."""
    return fstripe_sff(head_dim, num_heads, num_levels=12)


def fstripe_pooled(head_dim: int, num_heads: int) -> nn.Module:
    """Return the published F-StrIPE, 64 features."""
    return fastpe.FStripe(head_dim, num_heads)


def fstripe_unpooled(head_dim: int, num_heads: int) -> nn.Module:
    """Return exact F-StrIPE with one sine, 2 D features."""
    return fastpe.FStripe(head_dim, num_heads, pool=False)


def _ours(label: str, *arguments: object, **options: object) -> Case:
    return Case(label, attention(*arguments, **options), ours=True)


OURS: dict[str, Case] = {
    "fastpe": _ours("no encoding"),
    "fastpe-rope": _ours("RoPE", rope),
    "fastpe-ropepool": _ours("RoPEPool", ropepool),
    "fastpe-sinespe": _ours("SineSPE", sinespe),
    "fastpe-favor": _ours("FAVOR+", favor=True),
    "fastpe-spe-favor": _ours("SineSPE, FAVOR+", sinespe, favor=True),
    "fastpe-fstripe-sff": _ours("F-StrIPE:SFF, chords", fstripe_sff, "chord"),
    "fastpe-fstripe-chroma": _ours("F-StrIPE:SFF, chroma", fstripe_chroma, "chroma"),
    "fastpe-fstripe-pooled": _ours("F-StrIPE pooled", fstripe_pooled, "chord"),
    "fastpe-fstripe-unpooled": _ours("F-StrIPE unpooled", fstripe_unpooled, "chord"),
}
