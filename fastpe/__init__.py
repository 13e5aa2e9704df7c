"""fastpe: causal attention of linear cost with real positional encodings."""

from . import diagnostics, nn
from .attention import (
    LinearAttentionState,
    causal_linear_attention,
    causal_linear_attention_step,
)
from .backends import available_backends
from .banded import banded_attention
from .config import show_config
from .encodings import ConvSPE, FStripe, PositionalEncoding, RoPE, RoPEPool, SineSPE
from .published import load_spe_state_dict

__version__ = "0.1.0"

__all__ = [
    "ConvSPE",
    "FStripe",
    "LinearAttentionState",
    "PositionalEncoding",
    "RoPE",
    "RoPEPool",
    "SineSPE",
    "__version__",
    "available_backends",
    "banded_attention",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "diagnostics",
    "load_spe_state_dict",
    "nn",
    "show_config",
]
