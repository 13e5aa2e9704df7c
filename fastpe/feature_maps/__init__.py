"""Feature maps: the functions psi that turn encoded queries and keys into features."""

from .base import DPFP, WIDE_MAPS, FeatureMap, Hedgehog, Taylor2
from .favor import Favor

__all__ = ["DPFP", "WIDE_MAPS", "Favor", "FeatureMap", "Hedgehog", "Taylor2"]
