"""The kernels' route: features by encoding and feature map, then the scan.

Two halves of it stand alone: `absorb` turns keys into a state, `readout` lets queries see a state.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ..backends import reference
from ..backends.specs import Rotation, ScanOptions, compute_dtype
from ..feature_maps.base import FeatureMap
from ..feature_maps.favor import Favor
from ..ops.causal_dot import causal_dot, step
from . import banded, log_scan
from .call import Setting
from .encode import before_map, by_sequence, features, log_features
from .favor import favor_attention
from .packing import Packing, Rows, blank

_NORMALIZE = {False: "none", True: "sum", "abs": "abs"}
# s and z; with Favor c too; before and after a step what rounding took
State = tuple[Tensor, ...]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, ...]:
    """Return o [B, T, H, E] in v's dtype, and the final state, of causal self-attention.

    Args:
        q: [B, T, H, D].
        k: [B, T, Hk, D]; Hk divides H.
        v: [B, T, Hk, E].
        positions: [B or 1, T, L] with an encoding.
        state: Before the first token.
        setting: Everything else that is asked for.
        packing: Which tokens are of which sequence.
    """
    by_lag = setting.encoding is not None and setting.encoding.banded
    favor, whole = isinstance(setting.feature_map, Favor), state
    if state is not None and not favor:
        state = state[:2]  # what rounding took is for steps alone
    if by_lag and packing.padding is not None:
        return _without_padding(q, k, v, state, setting, packing.padding)
    alone = favor or by_lag or setting.backend == "reference"
    if packing.cu_seqlens is not None and alone:
        return _one_by_one(q, k, v, positions, state, setting, packing.cu_seqlens)
    if by_lag:
        return _attend_banded(q, k, v, state, setting)
    if favor:
        return _attend_favor(q, k, v, positions, state, setting, packing.padding)
    if setting.backend == "reference":
        return _attend_reference(q, k, v, positions, state, setting, packing.padding)
    if isinstance(setting.feature_map, FeatureMap):
        return _attend_mapped(q, k, v, positions, state, setting, packing)
    return _attend_kernels(q, k, v, positions, whole, setting, packing)


def _attend_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, ...]:
    encoding, where = setting.encoding, (None, None)
    maps, options = setting.maps, _options(setting)

    def made(x: Tensor, side: str) -> Tensor:
        make = functools.partial(before_map, side=side, setting=setting)
        return by_sequence(make, x, positions, packing)

    if encoding is not None and maps is None:
        q, k = made(q, "q"), made(k, "k")
    if q.shape[1] == 1 and state is not None and not packing:
        s, z, *lost = state
        given = {"positions": positions, "maps": maps, "options": options}
        done = step(q, k, v, s, z, **given, lost=lost[0] if lost else None)
        if done is not None:
            return done
    if maps is not None and isinstance(maps[0], Rotation):
        # rotations are fused into the scan; everything else makes features first
        where = positions, maps[0].freq
    elif maps is not None:
        q, k = made(q, "q"), made(k, "k")
    return _scan(q, k, v, where, state, options, packing)


def _attend_mapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, ...]:
    # features by a module are made before the scan

    def made(x: Tensor, side: str) -> Tensor:
        return by_sequence(
            lambda x, positions: features(x, positions, side, setting)[0], x, positions, packing
        )

    dtype = v.dtype
    options = ScanOptions.of_features(
        _NORMALIZE[setting.normalize], float(setting.eps), setting.chunk_size, setting.backend
    )
    q, k = made(q, "q"), made(k, "k")
    o, *state = _scan(q, k, v.to(q.dtype), (None, None), state, options, packing)
    return o.to(dtype), *state


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor | None, Tensor | None],
    state: State | None,
    options: ScanOptions,
    packing: Packing,
) -> tuple[Tensor, ...]:
    """Return o and the final s and z by a backend; where: positions and freq of a rotation."""
    ranges, rows = None, None
    if packing.cu_seqlens is not None:
        bounds = packing.cu_seqlens.long()
        ranges = torch.stack((bounds[:-1], bounds[1:]), 1)
    elif packing.padding is not None:
        rows = Rows(packing.padding)
        ranges, q, k, v = rows.ranges, *(rows.join(x) for x in (q, k, v))
        if where[0] is not None:
            where = rows.join(where[0].expand(*rows.shape, -1)), where[1]
    s, z = (None, None) if state is None else state[:2]
    o, s, z = causal_dot(q, k, v, s, z, *where, ranges, options=options)
    return o if rows is None else rows.split(o), s, z


def _options(setting: Setting) -> ScanOptions:
    maps = setting.maps
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
    padding: Tensor | None,
) -> tuple[Tensor, ...]:
    # everything by the reference backend: differentiable any number of times
    dtype = v.dtype
    q, k, v = (blank(x.to(compute_dtype(x)), padding) for x in (q, k, v))
    q, dq = _streams(q, positions, "q", setting, padding)
    k, dk = _streams(k, positions, "k", setting, padding)
    options = {"normalize": setting.normalize, "eps": setting.eps, "padding": padding}
    o, state = reference.chunked(
        q, k, v, dq, dk, state=state, chunk_size=setting.chunk_size, **options
    )
    return blank(o, padding).to(dtype), *state


def _streams(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `features` with zeros at padding, none for a normaliser that there is not."""
    x, norm = (blank(y, padding) for y in features(x, positions, side, setting))
    return x, norm if setting.normalize else norm[..., :0]


def _attend_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    padding: Tensor | None,
) -> tuple[Tensor, ...]:
    dtype = v.dtype
    q, k, v = (blank(x.to(compute_dtype(x)), padding) for x in (q, k, v))
    # what all features of a query have in common cancels
    a, _ = log_features(q, positions, "q", setting)
    b = _log_keys(k, positions, setting, padding, q.shape[2])
    o, *state = favor_attention(a, b, v, state, setting.chunk_size, setting.backend)
    return blank(o, padding).to(dtype), *state


def _log_keys(
    k: Tensor, positions: Tensor | None, setting: Setting, padding: Tensor | None, heads: int
) -> Tensor:
    """Return the logarithms of Favor's features of keys for all heads, -inf at padding."""
    exponent, half_square = log_features(reference.spread(k, heads), positions, "k", setting)
    b = exponent - half_square
    return b if padding is None else b.masked_fill(padding[..., None, None], -torch.inf)


def _attend_banded(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, setting: Setting
) -> tuple[Tensor, ...]:
    band, _ = setting.maps
    k, v = (reference.spread(x, q.shape[2]) for x in (k, v))
    return banded.attend(
        *(q, k, v, band),
        normalize=setting.normalize,
        eps=setting.eps,
        state=state,
        chunk_size=setting.chunk_size,
        backend=setting.backend,
    )


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, setting: Setting, padding: Tensor
) -> tuple[Tensor, ...]:
    # packed, by a look at where the padding is
    kept = ~padding
    bounds = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    o, *state = attend(
        *(x[kept][None] for x in (q, k, v)), None, state, setting, Packing(cu_seqlens=bounds)
    )
    return o.new_zeros(*padding.shape, *o.shape[2:]).masked_scatter(
        kept[..., None, None], o
    ), *state


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    cu_seqlens: Tensor,
) -> tuple[Tensor, ...]:
    """Return what `attend` does for packed sequences where no kernel takes them together."""
    lengths, none = cu_seqlens.diff().tolist(), itertools.repeat(None)
    parts = [x.split(lengths, 1) for x in (q, k, v)]
    at = none if positions is None else positions.split(lengths, 1)
    # of no sequence too there is a state, of no rows
    before = none if state is None else zip(*(x.split(1) for x in state), strict=True)
    results = [attend(*each, setting, Packing()) for each in zip(*parts, at, before, strict=False)]
    if not results:
        o, *state = attend(q, k, v, positions, None, setting, Packing())
        return o, *(x[:0] for x in state)
    o, *state = zip(*results, strict=True)
    return torch.cat(o, 1), *map(torch.cat, state)


def attend_aligned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    packing: Packing,
    align: str,
) -> tuple[Tensor, ...]:
    """Return what `attend` does where q and k differ in length.

    Tokens that both have are scanned; further keys go into the state before or behind it, further
    queries read the state there.

    Args:
        positions: Of the longer one.
        align: "end" or "start": where those that both have stand in the longer one.
    """
    longest, more = max(k.shape[1], q.shape[1]), abs(k.shape[1] - q.shape[1])
    alone, both = slice(0, more), slice(more, None)
    if state is not None and not isinstance(setting.feature_map, Favor):
        state = state[:2]
    if align == "start":
        alone, both = slice(longest - more, None), slice(0, longest - more)
    at = [None if positions is None else positions[:, part] for part in (alone, both)]
    shared = *(x if x.shape[1] != longest else x[:, both] for x in (q, k, v)), at[1]
    longer_keys, padding = k.shape[1] == longest, packing.padding

    def absorbed(state: State | None) -> State:
        there = None if padding is None else padding[:, alone]
        return absorb(k[:, alone], v[:, alone], at[0], state, setting, there, q.shape[2])

    def read(state: State | None) -> Tensor:
        if state is None:  # there is nothing to see
            return v.new_zeros(q.shape[0], more, q.shape[2], v.shape[-1])
        return readout(q[:, alone], at[0], state, setting).to(v.dtype)

    tokens = packing.part(both) if longer_keys else packing
    if align == "end":
        before = absorbed(state) if longer_keys else state
        o, *after = attend(*shared, before, setting, tokens)
        return (o if longer_keys else torch.cat((read(state), o), 1)), *after
    o, *after = attend(*shared, state, setting, tokens)
    if longer_keys:
        return o, *absorbed(tuple(after))
    return torch.cat((o, read(tuple(after))), 1), *after


def absorb(
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: State | None,
    setting: Setting,
    padding: Tensor | None,
    heads: int,
) -> State:
    """Return the state after keys and values that no query looks at.

    heads: Of the queries.
    """
    k, v = (blank(x, padding) for x in (k, v))
    v = v.to(compute_dtype(v))
    if isinstance(setting.feature_map, Favor):
        b = _log_keys(k.to(v.dtype), positions, setting, padding, heads)
        return log_scan.absorb(b, reference.spread(v, heads), state)
    psi, dk = _streams(k, positions, "k", setting, padding)
    states = heads if setting.per_head else k.shape[2]
    new = reference.absorb(psi, v, dk, states)
    return new if state is None else tuple(x + y for x, y in zip(state, new, strict=True))


def readout(
    q: Tensor,
    positions: Tensor | None,
    state: State,
    setting: Setting,
    padding: Tensor | None = None,
) -> Tensor:
    """Return what queries see of a state, [B, T, H, E] in the dtype of arithmetic; 0 at padding."""
    q = blank(q, padding)
    if isinstance(setting.feature_map, Favor):
        a, _ = log_features(q.to(compute_dtype(q)), positions, "q", setting)
        return blank(log_scan.readout(a, state), padding)
    phi, dq = _streams(q, positions, "q", setting, padding)
    options = {"normalize": setting.normalize, "eps": setting.eps, "padding": padding}
    return blank(reference.readout(phi, dq, *state, **options), padding)
