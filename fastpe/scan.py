"""What one call of the attention runs: features by encoding and feature map, then the scan.

Two halves of it stand alone: keys into a state (`absorb`), and queries out of one (`readout`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .encodings import PositionalEncoding
from .maps import Rotation
from .ops import ScanOptions, causal_dot, compute_dtype, observed, phase_features, step
from .packing import Packing, Rows, blank

_NORMALIZE = {False: "none", True: "sum", "abs": "abs"}
State = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """How to attend: what calls with a state in common have in common, and how fast."""

    encoding: PositionalEncoding | None
    feature_map: str
    normalize: bool | str
    eps: float
    chunk_size: int | None
    backend: str


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, E] in v's dtype, and the final s and z, of causal self-attention.

    Args:
        q: [B, T, H, D].
        k: [B, T, Hk, D]; Hk divides H.
        v: [B, T, Hk, E].
        positions: [B or 1, T, L] with an encoding.
        state: s and z before the first token.
        setting: Everything else that is asked for.
        packing: Which tokens are of which sequence.
    """
    if setting.backend == "reference":
        return _attend_reference(q, k, v, positions, state, setting, packing)
    encoding = setting.encoding
    maps = None if encoding is None else encoding.position_maps(q.device)
    options = _options(setting, maps)
    if encoding is not None and maps is None:
        q, k = (blank(x, packing.padding) for x in (q, k))
        q, k = (_encoded(x, positions, side, None, setting) for x, side in ((q, "q"), (k, "k")))
    if q.shape[1] == 1 and state is not None and not packing:
        done = step(q, k, v, *state, positions=positions, maps=maps, options=options)
        if done is not None:
            return done
    where = (None, None)
    if maps is not None and isinstance(maps[0], Rotation):
        # rotations are fused into the scan; everything else makes features first
        where = positions, maps[0].freq
    elif maps is not None:
        q, k = (blank(x, packing.padding) for x in (q, k))
        q, k = (
            _encoded(x, positions, side, maps, setting, packing.cu_seqlens)
            for x, side in ((q, "q"), (k, "k"))
        )
    ranges, rows = None, None
    if packing.cu_seqlens is not None:
        bounds = packing.cu_seqlens.long()
        ranges = torch.stack((bounds[:-1], bounds[1:]), 1)
    elif packing.padding is not None:
        rows = Rows(packing.padding)
        ranges, q, k, v = rows.ranges, *(rows.join(x) for x in (q, k, v))
        if where[0] is not None:
            where = rows.join(where[0].expand(*rows.shape, -1)), where[1]
    o, s, z = causal_dot(q, k, v, *(state or (None, None)), *where, ranges, options=options)
    return o if rows is None else rows.split(o), s, z


def attend_aligned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
    align: str,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `attend` does where q and k differ in length.

    Tokens that both have are scanned; further keys go into the state before or behind it, further
    queries read the state there.

    Args:
        positions: Of the longer one.
        align: "end" or "start": where those that both have stand in the longer one.
        heads: Of the state.
    """
    more = abs(k.shape[1] - q.shape[1])
    longest = max(k.shape[1], q.shape[1])
    alone, both = slice(0, more), slice(more, None)
    if align == "start":
        alone, both = slice(longest - more, None), slice(0, longest - more)

    def cut(x: Tensor | None, tokens: slice) -> Tensor | None:
        return x if x is None or x.shape[1] != longest else x[:, tokens]

    at = [None if positions is None else positions[:, part] for part in (alone, both)]
    shared = *(cut(x, both) for x in (q, k, v)), at[1]
    longer_keys = k.shape[1] == longest
    padding = packing.padding
    tokens = packing if not longer_keys else packing.part(both)

    def absorbed(state: State | None) -> State:
        there = None if padding is None else padding[:, alone]
        return absorb(k[:, alone], v[:, alone], at[0], state, setting, there, heads)

    def read(state: State | None) -> Tensor:
        if state is None:  # there is nothing to see
            return v.new_zeros(q.shape[0], more, q.shape[2], v.shape[-1])
        return readout(q[:, alone], at[0], state, setting).to(v.dtype)

    if align == "end":
        before = None if longer_keys else read(state)
        o, *state = attend(*shared, absorbed(state) if longer_keys else state, setting, tokens)
        return (o if longer_keys else torch.cat((before, o), 1)), *state
    o, *state = attend(*shared, state, setting, tokens)
    if longer_keys:
        return o, *absorbed(tuple(state))
    return torch.cat((o, read(tuple(state))), 1), *state


def _options(setting: Setting, maps: tuple | None) -> ScanOptions:
    rotation = maps[0] if maps is not None and isinstance(maps[0], Rotation) else None
    return ScanOptions(
        feature_map=setting.feature_map,
        normalize=_NORMALIZE[setting.normalize],
        eps=float(setting.eps),
        interleaved=rotation is not None and rotation.interleaved,
        pool=rotation is not None and rotation.pool,
        map_first=rotation is None or rotation.map_first,
        scale=1.0 if rotation is None else rotation.scale,
        chunk=setting.chunk_size or 0,
        backend=setting.backend,
    )


def _attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    # everything by reference.py: differentiable any number of times
    if packing.cu_seqlens is not None:
        return _one_by_one(q, k, v, positions, state, setting, packing.cu_seqlens)
    dtype, padding = v.dtype, packing.padding
    q, k, v = (blank(x.to(compute_dtype(x)), padding) for x in (q, k, v))
    q, dq = features(q, positions, "q", setting)
    k, dk = (blank(x, padding) for x in features(k, positions, "k", setting))
    if not setting.normalize:
        dq, dk = dq[..., :0], dk[..., :0]
    options = {"normalize": setting.normalize, "eps": setting.eps}
    o, (s, z) = reference.chunked(
        q, k, v, dq, dk, state=state, chunk_size=setting.chunk_size, **options
    )
    return blank(o, padding).to(dtype), s, z


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds, results = cu_seqlens.tolist(), []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        tokens = slice(begin, end)
        before = None if state is None else tuple(x[i : i + 1] for x in state)
        at = None if positions is None else positions[:, tokens]
        parts = (x[:, tokens] for x in (q, k, v))
        results.append(_attend_reference(*parts, at, before, setting, Packing()))
    if not results:
        return _attend_reference(q, k, v, positions, state, setting, Packing())
    o, s, z = zip(*results, strict=True)
    return torch.cat(o, 1), torch.cat(s), torch.cat(z)


def features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the features of queries or keys ("q", "k") for numerator and normaliser.

    [B, T, H, R] in the dtype of arithmetic, and [B, T, H or Hk, Rz]; keys of Hk heads keep them
    unless each head encodes them in its own way.
    """
    encoding = setting.encoding
    if setting.backend == "reference":
        x = x.to(compute_dtype(x))
    maps = None if encoding is None else encoding.position_maps(x.device)
    position_map = None if maps is None else maps["qk".index(side)]
    if encoding is not None and not isinstance(position_map, Rotation):
        x, position_map = _encoded(x, positions, side, maps, setting), None
    x = x.to(compute_dtype(x))
    return reference.features(x, positions, position_map, setting.feature_map)


def _encoded(
    x: Tensor,
    positions: Tensor,
    side: str,
    maps: tuple | None,
    setting: Setting,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return x encoded, before the feature map, by an encoding that is no rotation."""
    encoding = setting.encoding
    if maps is not None:
        sines = maps["qk".index(side)]
        if setting.backend == "reference":
            return reference.sine_features(x, positions, sines)
        if cu_seqlens is not None and x.device.type == "cpu" and not observed():
            # the same bits as alone: what tokens share of their sines decides how these are rounded
            parts = itertools.pairwise(cu_seqlens.tolist())
            tokens = [slice(*part) for part in parts]
            each = [
                phase_features(x[:, t], positions[:, t], sines, backend=setting.backend)
                for t in tokens
            ]
            return torch.cat(each, 1)
        return phase_features(x, positions, sines, backend=setting.backend)
    # one that is not ours: what the kernels rely on is checked
    if encoding.per_head and encoding.num_heads is not None:
        x = reference.spread(x, encoding.num_heads)
    y = encoding.features(x, positions, side)
    wanted = (*x.shape[:-1], encoding.feature_dim)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"pos_encoding.features must return {wanted} on {x.device}, got {came}")
    return y.to(x.dtype)


def absorb(
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    padding: Tensor | None,
    heads: int,
) -> State:
    """Return s [B, Hs, R, E] and z after keys and values that no query looks at."""
    k, v = (blank(x, padding) for x in (k, v))
    psi, dk = (blank(x, padding) for x in features(k, positions, "k", setting))
    s, z = reference.absorb(psi, v.to(psi.dtype), dk if setting.normalize else dk[..., :0], heads)
    return (s, z) if state is None else (state[0] + s, state[1] + z)


def readout(q: Tensor, positions: Tensor | None, state: State, setting: Setting) -> Tensor:
    """Return what queries see of a state, [B, T, H, E] in the dtype of arithmetic."""
    phi, dq = features(q, positions, "q", setting)
    if not setting.normalize:
        dq = dq[..., :0]
    return reference.readout(phi, dq, *state, normalize=setting.normalize, eps=setting.eps)
