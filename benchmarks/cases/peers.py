"""The peers of fastpe: softmax attention, chunked PyTorch, and SPE with materialised codes."""

from __future__ import annotations

import math
import shutil

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpe_lab.records import Setup

from .case import Case, Model

EPS = 1e-6
NUM_SINES, NUM_REALIZATIONS = 10, 64


def elu1(x: Tensor) -> Tensor:
    """Return elu(x) + 1."""
    return F.elu(x) + 1


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention by PyTorch's fused kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention through the masked T x T matrix."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(mask, -math.inf).softmax(-1), v)


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return normalised causal linear attention for features, through the T x T matrix."""
    weights = torch.einsum("bthr,bshr->bhts", q, k).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    return torch.einsum("bhts,bshe->bthe", weights, v)


def chunked(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return the same in O(T): matrices inside chunks, running sums between chunks.

    This was the fastest PyTorch that we found, eager and compiled.
    """
    batch, length, heads, _ = q.shape
    width = v.shape[-1]
    pad = -length % size

    def split(x: Tensor) -> Tensor:  # [B H N, C, .]
        x = x.transpose(1, 2)
        x = F.pad(x, (0, 0, 0, pad)) if pad else x
        return x.reshape(-1, size, x.shape[-1])

    # the column of ones sums the weights
    q, k, v = split(q), split(k), split(F.pad(v, (0, 1), value=1.0))
    state = torch.bmm(k.transpose(1, 2), v).unflatten(0, (batch * heads, -1)).cumsum(1)
    state = F.pad(state[:, :-1], (0, 0, 0, 0, 1, 0)).flatten(0, 1)
    weights = torch.bmm(q, k.transpose(1, 2)).tril()
    o = torch.baddbmm(torch.bmm(q, state), weights, v)
    o = o.view(batch, heads, length + pad, width + 1)[:, :, :length].transpose(1, 2)
    return o[..., :width] / (o[..., width:] + EPS)


class MaterialisedSPE:
    """SineSPE as published (arXiv 2105.08399): codes [T, H, D, R], times q and k, summed over D.

    Frequencies, offsets, gains and gate learn. Each training forward draws new noise.
    """

    def __init__(self, setup: Setup) -> None:
        h, d, k = setup.heads, setup.head_dim, NUM_SINES
        self.generator = torch.Generator(setup.device).manual_seed(0)
        self.device, self.dtype = setup.device, getattr(torch, setup.dtype)
        gains = self._normal(h, d, k)
        raw = [
            self._normal(h, d, k) - 4,
            self._normal(h, d, k),
            gains * 2 / gains.norm(dim=-1, keepdim=True).sqrt(),
            self._normal(h, d),
        ]
        self.parameters = [x.requires_grad_() for x in raw]
        self.shape = h, d, k
        self.redraw()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def redraw(self) -> None:
        """Draw new noise for the sines and for the gate."""
        h, d, k = self.shape
        self.noise = self._normal(h, d, 2 * k, NUM_REALIZATIONS)
        self.gate_noise = self._normal(h, d, NUM_REALIZATIONS)

    def codes(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the codes for queries and keys, [T, H, D, R]."""
        freqs, offsets, gains, gate = self.parameters
        d, k = self.shape[1:]
        time = torch.arange(length, device=self.device, dtype=torch.float32)
        angle = 2 * math.pi * time[:, None, None, None] * (freqs.float().sigmoid() / 2)
        scale = (NUM_REALIZATIONS * d) ** -0.25
        amplitude = F.softplus(gains) / math.sqrt(2 * k)
        g = gate.sigmoid()[..., None]
        codes = []
        for phase in (angle + offsets, angle):
            waves = torch.stack((phase.cos(), phase.sin()), dim=-1).to(self.dtype)
            waves = (waves * amplitude[..., None]).flatten(-2)  # [T, H, D, 2K]
            code = torch.einsum("thdj,hdjr->thdr", waves, self.noise)
            codes.append(scale * ((1 - g).sqrt() * code + g.sqrt() * self.gate_noise))
        return codes[0], codes[1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        """Return causal linear attention of the encoded queries and keys."""
        code_q, code_k = self.codes(q.shape[1])
        q = (q[..., None] * code_q).sum(-2)
        k = (k[..., None] * code_k).sum(-2)
        return chunked(elu1(q), elu1(k), v, size)

    def reference(self, wide: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the same with float64 parameters `wide`, without codes, by the T x T matrix."""
        freqs, offsets, gains, gate = wide
        d, n = self.shape[1:]
        r = NUM_REALIZATIONS
        gain = F.softplus(gains) * ((1 - gate.sigmoid()) / (2 * n)).sqrt()[..., None]
        time = torch.arange(q.shape[1], device=q.device, dtype=torch.float64)
        cycles = torch.einsum("t,hdk->thdk", time, freqs.sigmoid() / 2)
        features = []
        for x, shift in ((q, offsets), (k, torch.zeros_like(offsets))):
            angle = 2 * math.pi * cycles + shift
            cos = torch.einsum("bthd,thdk,hdkr->bthr", x, angle.cos() * gain, self.noise[:, :, ::2])
            sin = torch.einsum(
                "bthd,thdk,hdkr->bthr", x, angle.sin() * gain, self.noise[:, :, 1::2]
            )
            rest = torch.einsum("bthd,hd,hdr->bthr", x, gate.sigmoid().sqrt(), self.gate_noise)
            features.append(elu1((cos + sin + rest) / (r * d) ** 0.25))
        return quadratic(*features, v)


def build_sdpa(setup: Setup, variant: int | None) -> Model:
    """Return PyTorch's fused attention; in half precision on a GPU, FlashAttention."""
    if setup.device == "cuda" and getattr(torch, setup.dtype).itemsize == 2:
        # set once: a context around each call would take much of a short call's time
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        x = torch.ones(1, 8, 1, setup.head_dim, dtype=getattr(torch, setup.dtype), device="cuda")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            sdpa(x, x, x)  # raises if FlashAttention cannot run
    return Model(sdpa, softmax)


def build_softmax(setup: Setup, variant: int | None) -> Model:
    """Return naive softmax attention; its reference is the fused kernel in float64."""
    return Model(softmax, sdpa)


def build_chunked(setup: Setup, variant: int | None) -> Model:
    """Return chunked linear attention in eager PyTorch; the variant is the chunk size."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked(elu1(q), elu1(k), v, variant)

    return Model(forward, lambda q, k, v: quadratic(elu1(q), elu1(k), v))


def build_compiled(setup: Setup, variant: int | None) -> Model:
    """Return chunked linear attention under torch.compile, for one length."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    model = build_chunked(setup, variant)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    return model


def build_spe(setup: Setup, variant: int | None) -> Model:
    """Return SPE with materialised codes on chunked linear attention."""
    spe = MaterialisedSPE(setup)
    wide = [x.detach().double().requires_grad_() for x in spe.parameters]
    spe_wide = MaterialisedSPE(setup)
    spe_wide.noise, spe_wide.gate_noise = spe.noise.double(), spe.gate_noise.double()
    return Model(
        forward=lambda q, k, v: spe(q, k, v, variant),
        reference=lambda q, k, v: spe_wide.reference(wide, q, k, v),
        parameters=spe.parameters,
        reference_parameters=wide,
        redraw=spe.redraw,
    )


def bytes_of_scores(setup: Setup, training: bool) -> float:
    """Return the memory of naive softmax attention: scores, masked scores, weights."""
    size = getattr(torch, setup.dtype).itemsize
    return 3.2 * size * setup.batch * setup.heads * setup.length**2


def bytes_of_codes(setup: Setup, training: bool) -> float:
    """Return the memory of the codes and their products with q and k."""
    size = getattr(torch, setup.dtype).itemsize
    product = size * setup.length * setup.heads * setup.head_dim * NUM_REALIZATIONS
    return (5 + 2 * setup.batch if training else 4 + setup.batch) * product


def no_compiler(setup: Setup) -> str | None:
    """Return why torch.compile cannot work, or None."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return None
    return "torch.compile needs a C++ compiler, and there is none"


PEERS: dict[str, Case] = {
    "sdpa": Case("SDPA (softmax)", build_sdpa, quadratic=True),
    "softmax": Case(
        "naive softmax", build_softmax, bytes_of_scores, quadratic=True, quadratic_memory=True
    ),
    "chunked": Case("chunked PyTorch", build_chunked, variants=(64, 128)),
    "chunked-compile": Case(
        "torch.compile",
        build_compiled,
        variants=(64, 128),
        slow_start=True,
        unavailable=no_compiler,
    ),
    "spe-codes": Case("SPE, codes", build_spe, bytes_of_codes, variants=(128,)),
}
