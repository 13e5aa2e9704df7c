"""A small causal Transformer over sixteenths, whose attention is a matter of configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpe
from fastpe_lab import checks
from fastpe_lab.baselines import BASELINES
from fastpe_lab.baselines.ape import LearnedAPE, SinusoidalAPE, StructuralAPE

from .attention import BaselineAttention, LinearAttention, SoftmaxAttention
from .windows import KEYS, input_size, num_levels, split, structural_levels

# 64 bars, for modules that have a parameter for each step
LONGEST = 1024
# of freqs at the start: sigmoid(-1) / 2 = 0.13 cycles a label
STRUCTURAL_FREQUENCY = -1.0
# added to the input, so that any attention takes them; a model without has none of them
ADDED: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda dim, levels: NoAPE(),
    "ape": lambda dim, levels: LearnedAPE(dim, LONGEST),
    "sinusoidal": lambda dim, levels: SinusoidalAPE(dim),
    "sape": lambda dim, levels: StructuralAPE(dim, levels),
}
_SINES = {"num_sines": 10, "num_realizations": 64}
# of linear attention: head_dim, heads, levels, and whether the map comes before a rotation
ENCODINGS: dict[str, Callable[[int, int, int, str], fastpe.PositionalEncoding]] = {
    "rope": lambda d, h, levels, apply: fastpe.RoPE(
        d, h, learned=True, per_head=True, num_levels=levels, apply=apply
    ),
    "ropepool": lambda d, h, levels, apply: fastpe.RoPEPool(d, h, num_levels=levels, apply=apply),
    "spe": lambda d, h, levels, apply: fastpe.SineSPE(d, h, **_SINES),
    "spe-exact": lambda d, h, levels, apply: fastpe.SineSPE(d, h, num_realizations=None),
    "convspe": lambda d, h, levels, apply: fastpe.ConvSPE(d, h),
    "fstripe": lambda d, h, levels, apply: fastpe.FStripe(d, h, num_levels=levels, pool=False),
    "fstripe-pooled": lambda d, h, levels, apply: fastpe.FStripe(d, h, num_levels=levels),
    "fstripe-sff": lambda d, h, levels, apply: fastpe.FStripe(d, h, num_levels=levels, **_SINES),
}
# encodings that know no position but time
_OF_TIME = ("ape", "sinusoidal", "convspe")
MAPS: dict[str, Callable[[], str | fastpe.FeatureMap]] = {
    "favor": lambda: fastpe.Favor(128),
    "elu1": lambda: "elu1",
    "relu": lambda: "relu",
    "taylor2": fastpe.Taylor2,
    "dpfp": fastpe.DPFP,
}


@dataclass(frozen=True)
class Config:
    """What a model is; two of the same configuration have the same parameters.

    Args:
        task: "harmonize" or "next", see `windows.Windows`.
        attention: "linear", "softmax", or the name of one of `baselines.BASELINES`.
        pe: One of `ADDED` or, with linear attention, of `ENCODINGS`; "rope" with softmax too.
        prior: priors of the positions, joined by +.
        feature_map: One of `MAPS`, of linear attention.
        chords: Whether the chords' pitch classes are inputs.
        labels: "own", or "another": positions are those of another song, as a control.
        dim: Width of the model.
        heads: H.
        layers: Their number.
    """

    task: str = "harmonize"
    attention: str = "linear"
    pe: str = "ropepool"
    prior: str = "bin"
    feature_map: str = "elu1"
    chords: bool = False
    labels: str = "own"
    dim: int = 128
    heads: int = 4
    layers: int = 2

    def __post_init__(self) -> None:
        known = {
            "task": ("harmonize", "next"),
            "attention": ("linear", *BASELINES),
            "pe": (*ADDED, *ENCODINGS),
            "feature_map": MAPS,
            "labels": ("own", "another"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        split(self.prior)
        if self.dim < 1 or self.heads < 1 or self.layers < 1 or self.dim % self.heads:
            raise ValueError(
                "dim, heads and layers must be positive, and heads divide dim, got "
                f"{self.dim}, {self.heads} and {self.layers}"
            )
        allowed = {"linear": ENCODINGS, "softmax": ("rope",)}.get(self.attention, ())
        if self.pe in ENCODINGS and self.pe not in allowed:
            raise ValueError(
                f"pe must be one of {', '.join((*ADDED, *allowed))} with attention "
                f"{self.attention}, got {self.pe!r}"
            )
        if self.attention != "linear" and self.feature_map != type(self).feature_map:
            raise ValueError(
                f"feature_map is of linear attention: it must be {type(self).feature_map} with "
                f"attention {self.attention}, got {self.feature_map!r}"
            )
        if self.pe in ("rope", "ropepool") and self.dim // self.heads % 2:
            raise ValueError(
                f"dim / heads must be even with pe {self.pe}, got {self.dim} / {self.heads}"
            )
        if self.pe in _OF_TIME and self.prior != "time":
            raise ValueError(f"prior must be 'time' with pe {self.pe}, got {self.prior!r}")
        if self.pe in ("spe", "spe-exact") and num_levels(self.prior) > 1:
            raise ValueError(
                f"prior must be one number with pe {self.pe}, got {self.prior!r}; SPE of vectors "
                "is fstripe-sff"
            )


def saved_config(config: object, weights: object) -> Config:
    """Return the configuration that a file holds beside the weights of its model.

    Args:
        config: As `dataclasses.asdict` of a `Config`.
        weights: As `Model.state_dict`.
    Raises:
        ValueError: one of them is not, the weights are of another size, or not all are finite.
    """
    made = checks.made(Config, config, "config")
    checks.record(weights, {"head.weight": Tensor}, "model")
    for name, value in weights.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(f"model.{name} must be finite")
    # before a model of these sizes is made
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    checks.within("config.layers", made.layers, len(layers), len(layers))
    checks.within("config.dim", made.dim, *2 * weights["head.weight"].shape[-1:])
    return made


def takes_labels(attention: str) -> bool:
    """Return whether an attention system takes labels of the structure, whatever the encoding."""
    return attention in BASELINES and BASELINES[attention].structured


def variant(pe: str, prior: str) -> str:
    """Return the encoding behind a name: structural APE is S-APE, vector SPE is F-StrIPE:SFF."""
    if pe == "ape" and any(structural_levels(prior)):
        return "sape"
    return "fstripe-sff" if pe == "spe" and num_levels(prior) > 1 else pe


def check_step(config: Config) -> None:
    """Refuse what is added to the input: it would have to be told how many tokens came before.

    Raises:
        ValueError: something is.
    """
    if config.pe in ADDED and config.pe != "none":
        raise ValueError(f"pe must not be {config.pe} to go on from a state")


def make_encoding(config: Config) -> fastpe.PositionalEncoding | None:
    """Return the encoding of one layer, or None."""
    if config.pe not in ENCODINGS:
        return None
    # a map that is a module follows the encoding; others come first, as RoFormer has it
    apply = "after" if isinstance(MAPS[config.feature_map](), str) else "before"
    levels = num_levels(config.prior)
    encoding = ENCODINGS[config.pe](config.dim // config.heads, config.heads, levels, apply)
    _start_frequencies_(encoding, structural_levels(config.prior))
    return encoding


@torch.no_grad()
def _start_frequencies_(encoding: fastpe.PositionalEncoding, structural: list[bool]) -> None:
    # SPE's frequencies are for time, sines of some hundred steps: labels, which differ by one or a
    # few, would all seem the same. About an eighth of a turn for each tells them apart
    where = torch.tensor(structural)
    for name in ("freqs", "theta"):
        if hasattr(encoding, name):
            parameter = getattr(encoding, name)
            raw = torch.randn(*parameter.shape[:-1], sum(structural)) + STRUCTURAL_FREQUENCY
            # theta is in radians, freqs before sigmoid / 2
            parameter[..., where] = raw if name == "freqs" else math.pi * raw.sigmoid()


def make_attention(config: Config) -> nn.Module:
    """Return one layer's attention."""
    size = config.dim, config.heads
    if config.attention == "linear":
        return LinearAttention(*size, make_encoding(config), MAPS[config.feature_map]())
    if config.attention == "softmax":
        return SoftmaxAttention(*size, make_encoding(config))
    baseline = BASELINES[config.attention]
    options = {"max_len": LONGEST} if baseline.bounded else {}
    levels = num_levels(config.prior)
    core = baseline.make(config.dim // config.heads, config.heads, levels, **options)
    return BaselineAttention(*size, core, baseline.remembers)


class Block(nn.Module):
    """Attention and two linear layers, each normalised before and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.attention = make_attention(config)
        self.norm = nn.LayerNorm(dim)
        self.rest = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, object]:
        """Return y [B, T, dim] for x [B, T, dim], and the state after the last token."""
        y, state = self.attention(self.norm(x), positions)
        x = x + y
        return x + self.rest(x), state

    def step(self, x: Tensor, positions: Tensor, state: object) -> tuple[Tensor, object]:
        """Return y [B, dim] for one more token x [B, dim], and the state after it."""
        y, state = self.attention.step(self.norm(x), positions, state)
        x = x + y
        return x + self.rest(x), state


class Model(nn.Module):
    """Predicts the keys that sound and are struck at each sixteenth, from the input until then.

    Args:
        config: attention, encoding and sizes.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # whether it takes positions at all
        self.positioned = config.pe != "none" or takes_labels(config.attention)
        self.embedding = nn.Linear(input_size(config.chords), config.dim)
        self.added = ADDED.get(config.pe, ADDED["none"])(config.dim, num_levels(config.prior))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, 2 * KEYS)
        # most keys are silent most of the time
        nn.init.constant_(self.head.bias, -3.0)

    def forward(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, list[object]]:
        """Return logits [B, T, 2, 88] and the layers' states, of inputs [B, T, C]."""
        x, states = self._embed(inputs, positions), []
        for block in self.blocks:
            x, state = block(x, positions)
            states.append(state)
        return self.head(self.norm(x)).unflatten(-1, (2, KEYS)), states

    def step(
        self, inputs: Tensor, positions: Tensor, states: list[object]
    ) -> tuple[Tensor, list[object]]:
        """Return logits [B, 2, 88] after one more step, inputs [B, C], and the states."""
        check_step(self.config)
        x, after = self.embedding(inputs), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, positions, state)
            after.append(state)
        return self.head(self.norm(x)).unflatten(-1, (2, KEYS)), after

    def _embed(self, inputs: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(inputs)
        if self.config.pe in ("sinusoidal", "sape"):
            # or the sines would drown it (Vaswani et al. 2017, section 3.4)
            x = x * self.config.dim**0.5
        # absolute positions are time's, which a window counts from its own beginning
        return self.added(x, positions if self.config.pe == "sape" else None)

    def auxiliary_loss(self) -> Tensor | float:
        """Return the sum of the auxiliary losses of the attention systems."""
        cores = [getattr(block.attention, "core", None) for block in self.blocks]
        return sum(core.auxiliary_loss for core in cores if hasattr(core, "auxiliary_loss"))


class NoAPE(nn.Module):
    """Nothing added to the input."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return x."""
        return x


def nats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return nats a step, [..., T] each: of the keys that sound, and of their being struck.

    Args:
        logits: [..., T, 2, 88].
        target: [..., T, 2, 88]; only keys that sound can be struck.
    """
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return losses[..., 0, :].sum(-1), (losses[..., 1, :] * target[..., 0, :]).sum(-1)
