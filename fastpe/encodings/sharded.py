"""Initial values for parameters that may be sharded."""

from __future__ import annotations

import torch
from torch import Tensor


def put(p: Tensor, x: Tensor) -> None:
    """Copy x, equal on every rank, into a parameter or into a rank's shard of it (a DTensor)."""
    with torch.no_grad():
        if hasattr(p, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            x = distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(x)
