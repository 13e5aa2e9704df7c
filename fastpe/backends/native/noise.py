"""Noise by the CPU library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import check_devices
from . import library
from .library import CPU, DTYPES, PhiloxNormal, call, thread_count


def philox_normal(
    seed: Tensor,
    step: Tensor,
    module: int,
    kind: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """Return standard normal numbers [HD, J, R] (`noise.philox_normal`)."""
    check_devices(("seed", "step"), (seed, step))
    out = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    hd, rows, r = shape
    args = PhiloxNormal(
        seed=int(seed) & (2**64 - 1),
        step=int(step) & (2**32 - 1),
        first=first & (2**32 - 1),
        module=module,
        kind=kind,
        threads=thread_count(hd * rows),
        isa=library.isa,
        dtype=DTYPES[dtype],
        hd=hd,
        rows=rows,
        r=r,
        out=out.data_ptr(),
    )
    call("philox_normal", out.device, args, library=CPU)
    return out
