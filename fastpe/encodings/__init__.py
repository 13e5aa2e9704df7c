"""Positional encodings for linear attention, as modules."""

from .base import PositionalEncoding
from .convspe import ConvSPE
from .fstripe import FStripe
from .rope import RoPE, RoPEPool
from .spe import SineSPE

__all__ = ["ConvSPE", "FStripe", "PositionalEncoding", "RoPE", "RoPEPool", "SineSPE"]
