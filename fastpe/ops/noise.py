"""Gaussian noise by counter: the operator, its kinds, orthogonal columns.

A number depends on its key and its place alone. So prefill and decoding see the same noise, and a
longer or wider draw begins with the shorter one. See docs/math.md, "Noise".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _torch, backends
from ..backends.reference import noise
from .register import operator

SINE, GATE, CONV, OMEGA = range(4)  # kinds of noise, each with its own key


def orthogonalized(z: Tensor) -> Tensor:
    """Return Gaussian columns [..., F, M] made orthogonal in blocks of F, with lengths unchanged.

    The directions become uniform (Haar) frames, independent of the lengths, so each column is still
    Gaussian (Yu et al. 2016, arXiv 1610.09072).
    """
    return frames(z) * z.norm(dim=-2, keepdim=True)


def frames(z: Tensor) -> Tensor:
    """Return Gaussian columns [..., F, M] made orthonormal in blocks of F, Haar distributed."""
    blocks = []
    for block in z.split(z.shape[-2], dim=-1):
        q, r = torch.linalg.qr(block)
        # Q is uniform once it takes the signs of R's diagonal
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(z.dtype)
        blocks.append(q * signs[..., None, :])
    return torch.cat(blocks, -1)


@operator(
    "philox_normal(Tensor seed, Tensor step, int module, int kind, int[] shape, ScalarType dtype, "
    "int first=0) -> Tensor",
    lambda seed, step, module, kind, shape, dtype, first=0: seed.new_empty(shape, dtype=dtype),
)
def philox_normal(seed, step, module, kind, shape, dtype, first=0):
    """Return `reference.noise.philox_normal(...)`, from a kernel if there is one."""
    backend = {"cpu": "cpu", "cuda": "triton"}.get(seed.device.type)
    if backend and backends.unavailable(backend, seed.device) is None:
        return backends.load(backend).philox_normal(seed, step, module, kind, shape, dtype, first)
    return noise.philox_normal(seed, step, module, kind, tuple(shape), dtype, first)


@operator("count_forward(Tensor(a!) step, int unit) -> ()", lambda step, unit: None)
def count_forward(step, unit):
    """Add a unit to the step of the noise, in compiled code."""
    if _torch.backward_number() != -1:
        raise RuntimeError(
            "a compiled forward with noise ran again inside backward, which would redraw the "
            "noise: compile around the checkpoint, not inside, or construct the encoding with "
            "resample='never' and call resample_() before each forward"
        )
    step.add_(unit)
