"""Causal linear attention from the logarithms of features, of any size, in plain PyTorch.

o_m = sum_{n<=m} W_mn v_n / sum_{n<=m} W_mn,  W_mn = sum_j exp(a_mj + b_nj)

with logarithms a of queries' features and b of keys'. Feature j is measured from
c_j(m) = max_{n<=m} b_nj, and query m from top_m = max_j (a_mj + c_j(m)) (docs/math.md, "Feature
maps"). Each weight is a product of exp(a_mj + c_j(i) - top_m) and exp(b_nj - c_j(i)) for a token i
between n and m. Both factors are at most 1, so nothing overflows, and an underflow vanishes beside
a denominator of at least 1. No token depends on a later one. c and top cancel in o, so they are
constants to the gradient.

A masked key has logarithms of -inf; a query that sees no key outputs 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, Tensor, Tensor]


def log_scan(
    a: Tensor, b: Tensor, v: Tensor, state: State | None = None, chunk_size: int | None = None
) -> tuple[Tensor, Tensor, State]:
    """Return numerators, denominators and the final state; `divided` takes the first two.

    Quadratic inside chunks, with a state between them.

    Args:
        a: Logarithms of the queries' features, [B, T, H, R].
        b: Logarithms of the keys' features, [B, T, H, R].
        v: Values, [B, T, H, E].
        state: s [B, H, R, E], z [B, H, R] and c [B, H, R] of the tokens before, whose sums are
            s exp(c) and z exp(c).
        chunk_size: Tokens of a chunk, rounded up to a power of two.
    Returns:
        num: [B, T, H, E].
        den: [B, T, H], at least 1, or 0 for a query that sees no key.
        state: The state after the last token.
    """
    length, e = v.shape[1], v.shape[-1]
    size = _power_of_two(min(chunk_size or 64, max(length, 1)))
    # one more value of 1 adds up the denominator
    a, b, v = (x.transpose(1, 2) for x in (a, b, F.pad(v, (0, 1), value=1.0)))
    if state is None:
        before = v.new_zeros(*b.shape[:2], b.shape[-1], e + 1)
        c0 = torch.full_like(before[..., 0], -torch.inf)
    else:
        before, c0 = torch.cat((state[0], state[1][..., None]), -1), state[2].detach()
    c = running_max(b, c0)
    top = (a.detach() + c).amax(-1, keepdim=True)
    pad = -length % size
    last = torch.cat((c0[:, :, None], c), 2)[:, :, -1:]
    c = torch.cat((c, last.expand(-1, -1, pad, -1)), 2)
    a, b = (F.pad(x, (0, 0, 0, pad), value=-torch.inf) for x in (a, b))
    v, top = (F.pad(x, (0, 0, 0, pad)) for x in (v, top))
    # [B, H, N, C, .]
    a, b, v, c, top = (x.unflatten(2, (x.shape[2] // size, size)) for x in (a, b, v, c, top))
    s, c_s = _states(b, v, c, before, c0)
    seen = (a + c_s[:, :, :-1, None] - _finite(top)).exp() @ s[:, :, :-1]
    out = _within(a, b, v, c, top) + seen
    out = out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out[..., :e], out[..., e], (s[:, :, -1, :, :e], s[:, :, -1, :, e], c_s[:, :, -1])


def divided(num: Tensor, den: Tensor) -> Tensor:
    """Return num / den, 0 for a query that saw no key."""
    return num / den.masked_fill(den == 0, 1.0)[..., None]


def running_max(b: Tensor, c0: Tensor) -> Tensor:
    """Return max(c0, max_{n<=m} b_n) for each m, without gradient; b is [B, H, T, R]."""
    b = b.detach()
    return torch.maximum(b.cummax(2).values if b.shape[2] else b, c0[:, :, None])


def _states(b: Tensor, v: Tensor, c: Tensor, before: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
    """Return the N + 1 states around N chunks, [B, H, N + 1, R, E], and their c."""
    c_s = torch.cat((c0[:, :, None], c[..., -1, :]), 2)
    sums = (b - _finite(c[..., -1:, :])).exp().mT @ v
    s = torch.cat((before[:, :, None], sums), 2)
    # sums over 1, 2, 4, ... chunks, measured from the c of the last chunk
    span = 1
    while span < s.shape[2]:
        decay = (c_s[:, :, :-span] - _finite(c_s[:, :, span:])).exp()
        s = s + F.pad(decay[..., None] * s[:, :, :-span], (0, 0, 0, 0, span, 0))
        span *= 2
    return s, c_s


def _within(a: Tensor, b: Tensor, v: Tensor, c: Tensor, top: Tensor) -> Tensor:
    """Return sums inside chunks: tokens by themselves, then block halves of 1, 2, 4, ... tokens."""
    top, size = _finite(top), a.shape[-2]
    out = (a + b - top).exp().sum(-1, keepdim=True) * v
    half = 1
    while half < size:
        blocks = size // (2 * half), 2, half
        b0, v0, c0 = (x.unflatten(-2, blocks).select(-3, 0) for x in (b, v, c))
        a1, top1 = (x.unflatten(-2, blocks).select(-3, 1) for x in (a, top))
        # queries of the right half, keys of the left half, measured from the left half's end
        middle = c0[..., -1:, :]
        weights = (a1 + middle - top1).exp() @ (b0 - _finite(middle)).exp().mT
        seen = weights @ v0
        out = out + torch.stack((torch.zeros_like(seen), seen), -3).flatten(-4, -2)
        half *= 2
    return out


def _finite(x: Tensor) -> Tensor:
    # for subtraction: -inf - -inf would be nan, but exp(-inf) = 0 is meant
    return x.masked_fill(x == -torch.inf, 0.0)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def absorb(b: Tensor, v: Tensor, state: State | None = None) -> State:
    """Return the state after keys alone; arguments and state as in `log_scan`."""
    top = b.detach().amax(1) if b.shape[1] else torch.full_like(b.sum(1), -torch.inf)
    psi = (b - _finite(top)[:, None]).exp()
    new = torch.einsum("bthr,bthe->bhre", psi, v), psi.sum(1), top
    return new if state is None else combine(state, new)


def combine(first: State, second: State) -> State:
    """Return the state after the tokens of both states."""
    c = torch.maximum(first[2], second[2]).detach()
    decays = [(x[2].detach() - _finite(c)).exp() for x in (first, second)]
    pairs = list(zip((first, second), decays, strict=True))
    return sum(s * d[..., None] for (s, _, _), d in pairs), sum(z * d for (_, z, _), d in pairs), c


def readout(a: Tensor, state: State) -> Tensor:
    """Return the outputs [B, T, H, E] of queries that see a state alone; a as in `log_scan`."""
    s, z, c = state
    a = a + c.detach()[:, None]
    phi = (a - _finite(a.detach().amax(-1, keepdim=True))).exp()
    num = torch.einsum("bthr,bhre->bthe", phi, s)
    return divided(num, torch.einsum("bthr,bhr->bth", phi, z))
