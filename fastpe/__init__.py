"""fastpe: linear attention with relative positional encodings."""

from torch.serialization import add_safe_globals

from . import diagnostics, distributed, nn
from .attention.api import causal_linear_attention, causal_linear_attention_step, linear_attention
from .attention.banded import banded_attention
from .attention.state import LinearAttentionState
from .backends import available_backends
from .backends.config import show_config
from .encodings.base import PositionalEncoding
from .encodings.convspe import ConvSPE
from .encodings.fstripe import FStripe
from .encodings.rope import RoPE, RoPEPool
from .encodings.spe import SineSPE
from .feature_maps.base import DPFP, FeatureMap, Hedgehog, Taylor2
from .feature_maps.favor import Favor
from .integrations.spe import load_spe_state_dict
from .ops import flops

flops.watch()
# torch.load(..., weights_only=True) accepts states
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
