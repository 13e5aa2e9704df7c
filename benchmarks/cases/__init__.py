"""The rows of the benchmarks: fastpe's encodings, their peers, the literature's systems."""

from __future__ import annotations

from .case import Case, Model
from .gpu_peers import GPU_PEERS
from .literature import LITERATURE
from .ours import OURS
from .peers import PEERS

__all__ = ["CASES", "GPU_CASES", "LITERATURE", "OURS", "Case", "Model", "of_device"]

CASES: dict[str, Case] = {**PEERS, **OURS, **LITERATURE}
GPU_CASES: dict[str, Case] = {**PEERS, **GPU_PEERS, **OURS, **LITERATURE}


def of_device(device: str) -> dict[str, Case]:
    """Return the cases that run on a device."""
    return CASES if device == "cpu" else GPU_CASES
