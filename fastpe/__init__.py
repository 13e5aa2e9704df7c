"""fastpe: attention of linear cost with real positional encodings."""

from torch.serialization import add_safe_globals

from . import diagnostics, distributed, flops, nn
from .attention import (
    LinearAttentionState,
    causal_linear_attention,
    causal_linear_attention_step,
    linear_attention,
)
from .backends import available_backends
from .banded import banded_attention
from .config import show_config
from .encodings import ConvSPE, FStripe, PositionalEncoding, RoPE, RoPEPool, SineSPE
from .favor import Favor
from .feature_maps import DPFP, FeatureMap, Hedgehog, Taylor2
from .published import load_spe_state_dict

flops.watch()
# torch.load with weights_only=True takes states
add_safe_globals([LinearAttentionState])

__version__ = "0.1.0"

__all__ = [
    "DPFP",
    "ConvSPE",
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
    "banded_attention",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "diagnostics",
    "distributed",
    "linear_attention",
    "load_spe_state_dict",
    "nn",
    "show_config",
]
