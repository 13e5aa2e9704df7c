"""fastpe: causal attention of linear cost with real positional encodings."""

from . import distributed, nn
from .attention import (
    LinearAttentionState,
    causal_linear_attention,
    causal_linear_attention_step,
)
from .backends import available_backends
from .config import show_config
from .encodings import FStripe, PositionalEncoding, RoPE, RoPEPool, SineSPE

__version__ = "0.1.0"

__all__ = [
    "FStripe",
    "LinearAttentionState",
    "PositionalEncoding",
    "RoPE",
    "RoPEPool",
    "SineSPE",
    "__version__",
    "available_backends",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "distributed",
    "nn",
    "show_config",
]
