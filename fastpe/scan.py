"""What one call of the attention runs: features by encoding and feature map, then the scan.

Two halves of it stand alone: keys into a state (`absorb`), and queries out of one (`readout`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import banded, log_scan, reference
from .checks import shape
from .encoded import encoded
from .encodings import PositionalEncoding
from .favor import Favor, favor_attention
from .feature_maps import FeatureMap
from .maps import Rotation, SineMap
from .ops import ScanOptions, causal_dot, compute_dtype, observed, step
from .packing import Packing, Rows, blank

_NORMALIZE = {False: "none", True: "sum", "abs": "abs"}
# s and z, with Favor c too
State = tuple[Tensor, ...]


class Setting(NamedTuple):
    """How to attend: what calls that share a state have in common, and by what."""

    encoding: PositionalEncoding | None
    feature_map: str | FeatureMap
    normalize: bool | str
    eps: float
    chunk_size: int | None
    backend: str

    @property
    def per_head(self) -> bool:
        """Whether heads make features of keys in ways of their own."""
        psi = self.feature_map
        if isinstance(psi, FeatureMap) and (isinstance(psi, Favor) or psi.num_heads is not None):
            return True
        return self.encoding is not None and self.encoding.per_head


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
    favor = isinstance(setting.feature_map, Favor)
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
        dtype = v.dtype
        q, k = (
            _blank_features(x, positions, side, setting, packing)
            for x, side in ((q, "q"), (k, "k"))
        )
        options = _options(setting._replace(feature_map="identity"), None)
        o, *state = _scan(q, k, v.to(q.dtype), (None, None), state, options, packing)
        return o.to(dtype), *state
    return _attend_kernels(q, k, v, positions, state, setting, packing)


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
    maps = None if encoding is None else encoding.position_maps(q.device)
    options = _options(setting, maps)
    sides = (q, "q"), (k, "k")
    if encoding is not None and maps is None:
        q, k = (
            _by_sequence(
                lambda x, positions, side=side: _encoded(x, positions, side, setting),
                *(blank(x, packing.padding), positions, packing.cu_seqlens),
            )
            for x, side in sides
        )
    if q.shape[1] == 1 and state is not None and not packing:
        done = step(q, k, v, *state, positions=positions, maps=maps, options=options)
        if done is not None:
            return done
    if maps is not None and isinstance(maps[0], Rotation):
        # rotations are fused into the scan; everything else makes features first
        where = positions, maps[0].freq
    elif maps is not None:
        q, k = (_each_encoded(x, positions, side, setting, packing) for x, side in sides)
    return _scan(q, k, v, where, state, options, packing)


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
    o, s, z = causal_dot(q, k, v, *(state or (None, None)), *where, ranges, options=options)
    return o if rows is None else rows.split(o), s, z


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
    padding: Tensor | None,
) -> tuple[Tensor, ...]:
    # everything by reference.py: differentiable any number of times
    dtype = v.dtype
    q, k, v = (blank(x.to(compute_dtype(x)), padding) for x in (q, k, v))
    q, dq = features(q, positions, "q", setting)
    k, dk = (blank(x, padding) for x in features(k, positions, "k", setting))
    if not setting.normalize:
        dq, dk = dq[..., :0], dk[..., :0]
    options = {"normalize": setting.normalize, "eps": setting.eps}
    o, state = reference.chunked(
        q, k, v, dq, dk, state=state, chunk_size=setting.chunk_size, **options
    )
    return blank(o, padding).to(dtype), *state


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
    a, _ = _exponents(q, positions, "q", setting)
    b = _log_features(k, positions, setting, padding, q.shape[2])
    o, *state = favor_attention(a, b, v, state, setting.chunk_size, setting.backend)
    return blank(o, padding).to(dtype), *state


def _exponents(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    encoding = setting.encoding
    maps = None if encoding is None else encoding.position_maps(x.device)
    if encoding is not None and maps is None:
        x = _encoded(x, positions, side, setting)
    position_map = None if maps is None else maps["qk".index(side)]
    return setting.feature_map.exponents(x, positions, position_map, setting.backend)


def _log_features(
    k: Tensor, positions: Tensor | None, setting: Setting, padding: Tensor | None, heads: int
) -> Tensor:
    """Return the logarithms of Favor's features of keys for all heads, -inf at padding."""
    exponent, half_square = _exponents(reference.spread(k, heads), positions, "k", setting)
    b = exponent - half_square
    return b if padding is None else b.masked_fill(padding[..., None, None], -torch.inf)


def _attend_banded(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, setting: Setting
) -> tuple[Tensor, ...]:
    band, _ = setting.encoding.position_maps(q.device)
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
    results, bounds = [], cu_seqlens.tolist()
    # of no sequence too there is a state, of no rows
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        tokens = slice(begin, end)
        before = None if state is None else tuple(x[i : i + 1] for x in state)
        at = None if positions is None else positions[:, tokens]
        results.append(attend(*(x[:, tokens] for x in (q, k, v)), at, before, setting, Packing()))
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
        b = _log_features(k.to(v.dtype), positions, setting, padding, heads)
        return log_scan.absorb(b, reference.spread(v, heads), state)
    psi, dk = (blank(x, padding) for x in features(k, positions, "k", setting))
    if not setting.normalize:
        dk = dk[..., :0]
    states = heads if setting.per_head else k.shape[2]
    new = reference.absorb(psi, v, dk, states)
    return new if state is None else tuple(x + y for x, y in zip(state, new, strict=True))


def readout(q: Tensor, positions: Tensor | None, state: State, setting: Setting) -> Tensor:
    """Return what queries see of a state, [B, T, H, E] in the dtype of arithmetic."""
    if isinstance(setting.feature_map, Favor):
        a, _ = _exponents(q.to(compute_dtype(q)), positions, "q", setting)
        return log_scan.readout(a, state)
    phi, dq = features(q, positions, "q", setting)
    if not setting.normalize:
        dq = dq[..., :0]
    return reference.readout(phi, dq, *state, normalize=setting.normalize, eps=setting.eps)


def features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return the features of queries or keys ("q", "k") for numerator and normaliser.

    [B, T, H, R] in the dtype of arithmetic, and [B, T, H or Hk, Rz]; keys of Hk heads keep them
    unless each head makes features in its own way.
    """
    encoding, psi = setting.encoding, setting.feature_map
    if encoding is not None and encoding.banded:
        raise ValueError(
            "pos_encoding must have features here, to attend both ways or to other tokens, got "
            f"{encoding.signature}"
        )
    if setting.backend == "reference" or isinstance(psi, FeatureMap):
        x = x.to(compute_dtype(x))
    maps = None if encoding is None else encoding.position_maps(x.device)
    position_map = None if maps is None else maps["qk".index(side)]
    if encoding is not None and maps is None:
        x = _encoded(x, positions, side, setting)
    if isinstance(psi, FeatureMap):
        x = _mapped(psi, encoded(x, positions, position_map, setting.backend))
        return x, x
    if isinstance(position_map, SineMap):
        x, position_map = encoded(x, positions, position_map, setting.backend), None
    return reference.features(x.to(compute_dtype(x)), positions, position_map, psi)


def _blank_features(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting, packing: Packing
) -> Tensor:
    return _by_sequence(
        lambda x, positions: features(x, positions, side, setting)[0],
        *(blank(x, packing.padding), positions, packing.cu_seqlens),
    )


def _each_encoded(
    x: Tensor, positions: Tensor, side: str, setting: Setting, packing: Packing
) -> Tensor:
    sines = setting.encoding.position_maps(x.device)["qk".index(side)]
    return _by_sequence(
        lambda x, positions: encoded(x, positions, sines, setting.backend),
        *(blank(x, packing.padding), positions, packing.cu_seqlens),
    )


def _by_sequence(
    make: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return features of x, made as if each sequence was alone, to the last bit.

    On the CPU the tokens of a call decide how their sines are rounded, by what they share of them.
    """
    if cu_seqlens is None or x.device.type != "cpu" or observed() or len(cu_seqlens) <= 2:
        return make(x, positions)
    return torch.cat(
        [
            make(x[:, begin:end], None if positions is None else positions[:, begin:end])
            for begin, end in itertools.pairwise(cu_seqlens.tolist())
        ],
        dim=1,
    )


def _encoded(x: Tensor, positions: Tensor, side: str, setting: Setting) -> Tensor:
    # features of an encoding that is not ours: what the kernels rely on is checked
    encoding = setting.encoding
    if encoding.per_head and encoding.num_heads is not None:
        x = reference.spread(x, encoding.num_heads)
    return _checked(
        encoding.features(x, positions, side), x, encoding.feature_dim, "pos_encoding.features"
    )


def _mapped(feature_map: FeatureMap, x: Tensor) -> Tensor:
    # features of a map that may not be ours
    if feature_map.num_heads is not None:
        x = reference.spread(x, feature_map.num_heads)
    return _checked(feature_map(x), x, feature_map.feature_dim(x.shape[-1]), "feature_map")


def _checked(y: Tensor, x: Tensor, width: int, name: str) -> Tensor:
    wanted = (*x.shape[:-1], width)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        raise ValueError(f"{name} must return {wanted} on {x.device}, got {shape(y)}")
    return y.to(x.dtype)
