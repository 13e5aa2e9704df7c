"""The literature's attention systems, each in its own file, behind one interface.

    module = BASELINES["shaw"].make(head_dim=32, num_heads=4)
    o = module(q, k, v)                       # [B, T, H, D], T >= 1
    o = module(q, k, v, positions=labels)     # if Baseline.structured

Positions are [T], [B, T], [T, L] or [B, T, L]; systems that are not structured ignore them. Some
modules set `auxiliary_loss`: add it to the training loss. `ape` has encodings of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .ape import LearnedAPE, SinusoidalAPE, StructuralAPE
from .compressive import Compressive
from .fnet import FNet
from .linformer import Linformer
from .music_transformer import LocalMusicTransformer, MusicTransformer
from .performer import Performer
from .reformer import Reformer
from .shaw import Shaw
from .softmax import Softmax
from .stripe import Stripe
from .synthesizer import DenseSynthesizer, RandomSynthesizer
from .transformer_xl import TransformerXL

__all__ = ["BASELINES", "Baseline", "LearnedAPE", "SinusoidalAPE", "StructuralAPE"]


@dataclass(frozen=True)
class Baseline:
    """A system of the literature.

    Args:
        label: name in tables and plots.
        make: function of head_dim, num_heads, num_levels = 1 and the module's options that makes
            the module.
        causal: whether no output depends on later tokens.
        structured: whether the system needs positions, which are structure labels.
        quadratic_time: whether time grows with the square of T, else with T.
        quadratic_memory: whether memory grows with the square of T, else with T.
        remembers: whether forward takes `memory`: keys and values [B, T, H, D] made from inputs
            without gradients, so that projections learn from the memory.
        bounded: whether parameters grow with the longest T; then make takes max_len, and forward
            refuses longer sequences.
    """

    label: str
    make: Callable[..., nn.Module]
    causal: bool = True
    structured: bool = False
    quadratic_time: bool = True
    quadratic_memory: bool = True
    remembers: bool = False
    bounded: bool = False


def _sized(module: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    def make(head_dim: int, num_heads: int, num_levels: int = 1, **options: object) -> nn.Module:
        return module(head_dim, num_heads, **fixed, **options)

    return make


def _unsized(module: type[nn.Module]) -> Callable[..., nn.Module]:
    def make(head_dim: int, num_heads: int, num_levels: int = 1, **options: object) -> nn.Module:
        return module(**options)

    return make


def _stripe(sines: bool) -> Callable[..., nn.Module]:
    def make(head_dim: int, num_heads: int, num_levels: int = 1, **options: object) -> nn.Module:
        return Stripe(head_dim, num_heads, num_levels, sines=sines, **options)

    return make


_LINEAR = {"quadratic_time": False, "quadratic_memory": False}
_MEMORY = _LINEAR | {"remembers": True}

BASELINES: dict[str, Baseline] = {
    "softmax": Baseline("softmax", _unsized(Softmax), quadratic_memory=False),
    "shaw": Baseline("Shaw", _sized(Shaw)),
    "music-transformer": Baseline("Music Transformer", _sized(MusicTransformer)),
    "music-transformer-local": Baseline(
        "Music Transformer, local", _sized(LocalMusicTransformer), **_LINEAR
    ),
    "transformer-xl": Baseline("Transformer-XL", _sized(TransformerXL), **_MEMORY),
    "compressive-mean": Baseline("Compressive, mean", _sized(Compressive, kind="mean"), **_MEMORY),
    "compressive-max": Baseline("Compressive, max", _sized(Compressive, kind="max"), **_MEMORY),
    "compressive-conv": Baseline("Compressive, conv", _sized(Compressive, kind="conv"), **_MEMORY),
    "stripe-srpe": Baseline("StrIPE, S-RPE", _stripe(sines=False), structured=True),
    "stripe-ssrpe": Baseline("StrIPE, SS-RPE", _stripe(sines=True), structured=True),
    "performer": Baseline("Performer", _unsized(Performer), **_LINEAR),
    "reformer": Baseline("Reformer", _sized(Reformer), **_LINEAR),
    "synthesizer": Baseline("Synthesizer, dense", _sized(DenseSynthesizer), bounded=True),
    "synthesizer-random": Baseline("Synthesizer, random", _sized(RandomSynthesizer), bounded=True),
    "linformer": Baseline("Linformer", _sized(Linformer), causal=False, bounded=True, **_LINEAR),
    "fnet": Baseline("FNet", _unsized(FNet), causal=False, **_LINEAR),
}
