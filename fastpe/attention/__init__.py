"""Linear attention in one call: the public functions, and the state between calls."""

from .api import causal_linear_attention, causal_linear_attention_step, linear_attention
from .banded import banded_attention
from .state import LinearAttentionState

__all__ = [
    "LinearAttentionState",
    "banded_attention",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "linear_attention",
]
