"""Numbers for parameters that may be in shards."""

from __future__ import annotations

import torch
from torch import Tensor


def put(p: Tensor, x: Tensor) -> None:
    """Copy x, the same on every rank, into a parameter; into a rank's shard of it (a DTensor)."""
    with torch.no_grad():
        if hasattr(p, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            x = distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(x)
