"""Peers that only run on a GPU: cuDNN's softmax attention and fla's linear attention."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpe_lab.records import Setup

from .case import Case, Model
from .peers import EPS, elu1, quadratic, sdpa, softmax

BASE = 10000.0


def build_cudnn(setup: Setup, variant: int | None) -> Model:
    """Return PyTorch's fused attention by cuDNN; the choice costs the host about 20 us a call."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return Model(forward, softmax)


def build_fla(setup: Setup, variant: int | None) -> Model:
    """Return fla's chunked linear attention with its own normaliser."""
    from fla.ops.linear_attn import chunk_linear_attn

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk_linear_attn(elu1(q), elu1(k), v, scale=1.0, normalize=True)[0]

    return Model(forward, lambda q, k, v: quadratic(elu1(q), elu1(k), v))


def build_fla_rope(setup: Setup, variant: int | None) -> Model:
    """Return fla's linear attention with rotated features in the numerator, as in RoFormer."""
    from fla.modules.rotary import rotary_embedding
    from fla.ops.linear_attn import chunk_linear_attn

    tables = {}

    def rotate(x: Tensor) -> Tensor:
        key = x.shape[1], x.dtype
        if key not in tables:
            tables[key] = [y.to(x.dtype) for y in angles(x, torch.float32)]
        return rotary_embedding(x, *tables[key], interleaved=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = elu1(q), elu1(k)
        o = chunk_linear_attn(rotate(q), rotate(k), v, scale=1.0, normalize=False)[0]
        weight = (q * k.float().cumsum(1)).sum(-1, keepdim=True) + EPS
        return (o / weight).to(v.dtype)

    return Model(forward, rotated_reference)


def angles(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return cosine and sine of RoPE's angles, [T, D / 2]."""
    width = x.shape[-1] // 2
    theta = BASE ** (-torch.arange(width, device=x.device, dtype=torch.float64) / width)
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[:, None] * theta
    return [angle.cos().to(dtype), angle.sin().to(dtype)]


def rotated_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return linear attention with rotated features and an unrotated normaliser, by T x T."""
    q, k = elu1(q), elu1(k)
    cos, sin = (y[:, None] for y in angles(q, q.dtype))

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)

    weights = torch.einsum("bthd,bshd->bhts", rotate(q), rotate(k)).tril()
    total = torch.einsum("bthd,bshd->bhts", q, k).tril().sum(-1, keepdim=True) + EPS
    return torch.einsum("bhts,bshe->bthe", weights / total, v)


def no_cudnn(setup: Setup) -> str | None:
    """Return why cuDNN cannot run a setup, or None."""
    half = getattr(torch, setup.dtype).itemsize == 2
    return None if half else f"cuDNN's attention takes half precision, not {setup.dtype}"


def no_fla(setup: Setup) -> str | None:
    """Return why fla's kernels cannot run here, or None."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    try:
        importlib.import_module("fla.ops.linear_attn")
    except Exception as error:
        return f"fla does not import: {type(error).__name__}: {error}"
    return None


GPU_PEERS: dict[str, Case] = {
    "sdpa-cudnn": Case("SDPA by cuDNN", build_cudnn, quadratic=True, unavailable=no_cudnn),
    "fla": Case("fla", build_fla, unavailable=no_fla),
    "fla-rope": Case("fla, rotary", build_fla_rope, unavailable=no_fla),
}
