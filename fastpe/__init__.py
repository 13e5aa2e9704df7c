"""fastpe: attention of linear cost with real positional encodings."""

from torch.serialization import add_safe_globals

from . import nn
from .attention import (
    LinearAttentionState,
    causal_linear_attention,
    causal_linear_attention_step,
    linear_attention,
)
from .backends import available_backends
from .config import show_config
from .encodings import FStripe, PositionalEncoding, RoPE, RoPEPool, SineSPE
from .favor import Favor
from .feature_maps import DPFP, FeatureMap, Hedgehog, Taylor2

# torch.load with weights_only=True takes states
add_safe_globals([LinearAttentionState])

__version__ = "0.1.0"

__all__ = [
    "DPFP",
    "FStripe",
    "Favor",
    "FeatureMap",
    "Hedgehog",
    "LinearAttentionState",
    "PositionalEncoding",
    "RoPE",
    "RoPEPool",
    "SineSPE",
    "Taylor2",
    "__version__",
    "available_backends",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "linear_attention",
    "nn",
    "show_config",
]
