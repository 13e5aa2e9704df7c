"""Causal linear attention in plain PyTorch: by the T x T matrix, token by token, and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import Rotation, ScanOptions, SineMap, compute_dtype
from ..tensors import blank
from .elementwise import FEATURE_MAPS
from .sine_features import phases, sine_features, spread


def rotate(x: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Return x rotated pair by pair (RoPE), or the sum of each rotated pair (RoPEPool).

    RoPEPool keeps g = x1 (cos a + sin a) + x2 (cos a - sin a) of each pair, so that the products of
    features are eq. (23) of arXiv 2504.05364.
    """
    angle = phases(positions, rotation.freq)  # [B or 1, T, H or 1, W]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x = spread(x, rotation.freq.shape[0])
    width = rotation.freq.shape[1]
    head, rest = x[..., : 2 * width], x[..., 2 * width :]
    if rotation.interleaved:
        x1, x2 = head[..., 0::2], head[..., 1::2]
    else:
        x1, x2 = head.chunk(2, dim=-1)
    if rotation.pool:
        return rotation.scale * (x1 * (cos + sin) + x2 * (cos - sin))
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = (
        torch.stack((y1, y2), dim=-1).flatten(-2)
        if rotation.interleaved
        else torch.cat((y1, y2), -1)
    )
    return rotation.scale * torch.cat((y, rest), dim=-1)


def features(
    x: Tensor,
    positions: Tensor | None,
    encoding: Rotation | SineMap | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Return the features of x for the numerator and for the normaliser (often the same).

    If the encoding has parameters for each head, every head gets its own features.
    """
    psi = FEATURE_MAPS[feature_map]
    if isinstance(encoding, Rotation):
        if encoding.map_first:
            x = psi(x)
            return rotate(x, positions, encoding), x
        x = psi(rotate(x, positions, encoding))
    elif isinstance(encoding, SineMap):
        x = psi(sine_features(x, positions, encoding))
    else:
        x = psi(x)
    return x, x


def normalized(
    num: Tensor,
    den: Tensor,
    normalize: bool | str,
    eps: float,
    padding: Tensor | None = None,
) -> Tensor:
    """Return num / (den + eps); num / max(|den|, eps) for "abs"; num for False.

    Args:
        num: [B, T, H, E].
        den: [B, T, H].
        normalize: True, "abs" or False.
        eps: See above.
        padding: [B, T], True where num is not divided: it and den are 0 there.
    """
    if normalize is False:
        return num
    den = den.abs().clamp(min=eps) if normalize == "abs" else den + eps
    if padding is not None:
        den = den.masked_fill(padding[..., None], 1.0)
    return num / den[..., None]


def empty_state(q: Tensor, v: Tensor, dq: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before the first token: s [B, H, R, E] and z [B, H, Rz], zeros."""
    b, _, h, r = q.shape
    return q.new_zeros(b, h, r, v.shape[-1]), q.new_zeros(b, h, dq.shape[-1])


def absorb(k: Tensor, v: Tensor, dk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the state of keys and values alone: s [B, heads, R, E] and z [B, heads, Rz].

    Args:
        k: Features of the keys for the numerator, [B, T, Hk, R]; Hk divides heads.
        v: Values, [B, T, Hv, E].
        dk: Features of the keys for the normaliser, [B, T, Hz, Rz].
        heads: Number of states.
    """
    s = torch.einsum("bthr,bthe->bhre", spread(k, heads), spread(v, heads))
    return s, spread(dk.sum(1), heads, 1)


def readout(
    q: Tensor,
    dq: Tensor,
    s: Tensor,
    z: Tensor,
    *,
    normalize: bool | str = True,
    eps: float = 1e-6,
    padding: Tensor | None = None,
) -> Tensor:
    """Return the outputs of queries that see a state alone: q s / (dq z + eps), [B, T, H, E].

    Args:
        q: Features of the queries for the numerator, [B, T, H, R].
        dq: Features of the queries for the normaliser, [B, T, H, Rz].
        s: [B, Hs, R, E]; Hs divides H.
        z: [B, Hs, Rz].
    """
    q, dq = (x.unflatten(2, (s.shape[1], -1)) for x in (q, dq))
    num = torch.einsum("bthgr,bhre->bthge", q, s).flatten(2, 3)
    den = torch.einsum("bthgr,bhr->bthg", dq, z).flatten(2, 3)
    return normalized(num, den, normalize, eps, padding)


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    *,
    normalize: bool | str = True,
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return causal linear attention through the T x T matrix, and the final state.

    o_m = sum_{n<=m} (q_m . k_n) v_n / (sum_{n<=m} dq_m . dk_n + eps).

    Args:
        q: Features of the queries for the numerator, [B, T, H, R]; k likewise.
        v: Values, [B, T, H, E].
        dq: Features of the queries for the normaliser, [B, T, H, Rz]; dk likewise.
        state: (s, z) of the tokens before, s [B, H, R, E], z [B, H, Rz].
    """
    s, z = state if state is not None else empty_state(q, v, dq)
    num = torch.einsum("bthr,bshr->bhts", q, k).tril()
    num = torch.einsum("bhts,bshe->bthe", num, v) + torch.einsum("bthr,bhre->bthe", q, s)
    den = torch.einsum("bthr,bshr->bhts", dq, dk).tril().sum(-1).transpose(1, 2)
    den = den + torch.einsum("bthr,bhr->bth", dq, z)
    final = s + torch.einsum("bthr,bthe->bhre", k, v), z + dk.sum(1)
    return normalized(num, den, normalize, eps), final


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    *,
    normalize: bool | str = True,
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the same as `quadratic`, one token at a time through the state."""
    s, z = state if state is not None else empty_state(q, v, dq)
    num, den = [], []
    for t in range(q.shape[1]):
        s = s + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + dk[:, t]
        num.append(torch.einsum("bhr,bhre->bhe", q[:, t], s))
        den.append((dq[:, t] * z).sum(-1))
    if not num:
        return v.new_zeros(v.shape), (s, z)
    return normalized(torch.stack(num, 1), torch.stack(den, 1), normalize, eps), (s, z)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    *,
    normalize: bool | str = True,
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the same as `quadratic` in O(T): quadratic inside chunks, the state between them.

    Neighbouring heads of q may share heads of k, dk and v. The state has max(Hk, Hv) heads.
    """
    length, heads = q.shape[1], q.shape[2]
    states = max(k.shape[2], v.shape[2])
    if torch.compiler.is_compiling() and length > 1:
        # for any T, which may be a symbol: at least two chunks, as code for one is code of its own
        size = chunk_size or 64
        chunks = length // size + 2
    else:
        size = min(chunk_size or 64, max(length, 1))
        chunks = -(-length // size)
    k, v, dk = (spread(x, heads) for x in (k, v, dk))
    s, z = empty_state(q, v, dq) if state is None else (spread(x, heads, 1) for x in state)

    def split(x: Tensor) -> Tensor:  # [B, N, C, H, .], zeros behind the end
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, chunks * size - length))
        # contiguous: a slice of packed sequences gets the bits of the sequence alone
        return x.contiguous().unflatten(1, (chunks, size))

    qc, kc, vc, dqc, dkc = (split(x) for x in (q, k, v, dq, dk))
    # the state before each chunk: [B, N + 1, H, R, E], the last one is final
    s = torch.cat((s[:, None], torch.einsum("bnchr,bnche->bnhre", kc, vc)), 1).cumsum(1)
    z = torch.cat((z[:, None], dkc.sum(2)), 1).cumsum(1)
    num = torch.einsum("bnchr,bnjhr->bnhcj", qc, kc).tril()
    num = torch.einsum("bnhcj,bnjhe->bnche", num, vc)
    num = num + torch.einsum("bnchr,bnhre->bnche", qc, s[:, :-1])
    den = (dqc * (dkc.cumsum(2) + z[:, :-1, None])).sum(-1)
    num, den = num.flatten(1, 2)[:, :length], den.flatten(1, 2)[:, :length]
    final = (x[:, -1, :: max(heads // max(states, 1), 1)] for x in (s, z))
    return normalized(num, den, normalize, eps, padding), tuple(final)


_NORMALIZE = {"none": False, "sum": True, "abs": "abs"}


def causal_dot(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s0: Tensor | None,
    z0: Tensor | None,
    positions: Tensor | None,
    freq: Tensor | None,
    ranges: Tensor | None,
    options: ScanOptions,
    *,
    save: bool = True,
    padding: Tensor | None = None,
) -> tuple[Tensor, None, Tensor, Tensor]:
    """Return o, None and the final state (`ops.causal_dot.CausalDot`); save has no effect.

    Args:
        padding: [B, T], True at tokens that change nothing and whose outputs are 0.
    """
    inputs = q, k, v, s0, z0, positions, freq
    if ranges is not None:
        return _by_range(inputs, ranges, options)
    dtype, wide = v.dtype, compute_dtype(q)
    q, k, v = (blank(x.to(wide), padding) for x in (q, k, v))
    rotation = None
    if freq is not None:
        rotation = Rotation(
            freq, options.interleaved, options.pool, options.map_first, options.scale
        )
    streams = []
    for x in (q, k):
        x, norm = features(x, positions, rotation, options.feature_map)
        norm = norm[..., :0] if options.normalize == "none" else norm
        streams.append((blank(x, padding), blank(norm, padding)))
    (q, dq), (k, dk) = streams
    o, (s, z) = chunked(
        *(q, k, v, dq, dk),
        normalize=_NORMALIZE[options.normalize],
        eps=options.eps,
        state=None if s0 is None else (s0, z0),
        chunk_size=options.chunk or None,
        padding=padding,
    )
    return blank(o, padding).to(dtype), None, s, z


def _by_range(
    inputs: tuple[Tensor | None, ...], ranges: Tensor, options: ScanOptions
) -> tuple[Tensor, None, Tensor, Tensor]:
    """Return the same for ranges of the tokens of one row; this reads their bounds on the host."""
    q, k, v, s0, z0, positions, freq = inputs
    last, empty = 0, [x[:, :0] for x in (q, k, v)]
    # without any sequence the outputs and states have no rows
    o, _, *states = causal_dot(*empty, None, None, _cut(positions, 0, 0), freq, None, options)
    pieces, states = [o], [[x[:0]] for x in states]
    for i, (begin, end) in enumerate(ranges.tolist()):
        before = (None, None) if s0 is None else (s0[i : i + 1], z0[i : i + 1])
        part = [x[:, begin:end] for x in (q, k, v)]
        o, _, s, z = causal_dot(*part, *before, _cut(positions, begin, end), freq, None, options)
        pieces += [o.new_zeros(1, begin - last, *o.shape[2:]), o]
        states[0].append(s)
        states[1].append(z)
        last = end
    pieces.append(v.new_zeros(1, q.shape[1] - last, q.shape[2], v.shape[-1]))
    return torch.cat(pieces, 1), None, *map(torch.cat, states)


def _cut(positions: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if positions is None else positions[:, begin:end]
