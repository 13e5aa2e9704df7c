"""The route of the kernels: features, then the scan.

Two halves of it stand alone: `absorb` adds keys to a state, `readout` lets queries see one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.specs import Rotation, ScanOptions, compute_dtype
from ..backends.tensors import blank
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import FeatureMap
from ..ops.causal_dot import causal_dot, step
from ..ops.sine_features import sine_features
from .call import Setting, Sums, per_head
from .encode import before_scan, features
from .packing import Packing, Rows

_NORMALIZE = {False: "none", True: "sum", "abs": "abs"}


def kernel_sizes(
    q: Tensor, v: Tensor, encoding: PositionalEncoding | None, feature_map: str | FeatureMap
) -> tuple[torch.dtype, tuple[int, int, int]]:
    """Return the dtype that the kernels receive, and the largest D, R and E.

    Feature maps that are modules always compute in float32, in float64 for float64 inputs.
    """
    d, e = q.shape[-1], v.shape[-1]
    r = d if encoding is None else encoding.feature_dim
    if isinstance(feature_map, str):
        return q.dtype, (d, r, e)
    # the kernels make the map's inputs, and the scan takes its outputs
    out = feature_map.feature_dim(r)
    return compute_dtype(q), (max(d, r, out), out, e)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    packing: Packing,
) -> tuple[Tensor, Sums]:
    """Return o [B, T, H, E] in v's dtype, and the final state, of causal self-attention.

    Args:
        q: [B, T, H, D].
        k: [B, T, Hk, D]; Hk divides H.
        v: [B, T, Hk, E].
        positions: [B or 1, T, L] with an encoding.
        state: The state before the first token.
        setting: How to attend.
        packing: Which tokens belong to which sequence.
    """
    encoding, psi, normalize, eps, chunk_size, backend, _, maps = setting
    bounds, padding = packing
    packed = padding is not None or bounds is not None
    dtype, mapped = v.dtype, not isinstance(psi, str)
    rotation = maps[0] if maps is not None and isinstance(maps[0], Rotation) else None
    if mapped or backend in backends.IN_PYTORCH:
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    if mapped or (encoding is not None and (maps is None or (packed and rotation is None))):
        q, k = (
            before_scan(x, positions, side, setting, packing) for x, side in ((q, "q"), (k, "k"))
        )
        maps = None
    if mapped:
        rotation, psi = None, "identity"
    rotated = (False, False, True, 1.0) if rotation is None else rotation[1:]
    options = ScanOptions(
        psi, _NORMALIZE[normalize], float(eps), *rotated, chunk=chunk_size or 0, backend=backend
    )
    s, z, _, lost = (None,) * 4 if state is None else state
    if state is not None and q.shape[1] == 1 and not packed and not mapped:
        given = {"positions": positions, "maps": maps, "options": options}
        done = step(q, k, v, s, z, **given, lost=lost)
        if done is not None:
            o, s, z, lost = done
            return o, Sums(s, z, None, lost)
    if rotation is None and maps is not None:
        q = sine_features(q, positions, maps[0], backend=backend)
        k = sine_features(k, positions, maps[1], backend=backend)
    ranges = rows = freq = None
    if rotation is None:
        positions = None
    else:
        freq = rotation.freq
    if bounds is not None:
        bounds = bounds.long()
        ranges = torch.stack((bounds[:-1], bounds[1:]), 1)
    elif padding is not None and backend not in backends.IN_PYTORCH:
        rows = Rows(padding)
        ranges, q, k, v = rows.ranges, *(rows.join(x) for x in (q, k, v))
        if positions is not None:
            positions = rows.join(positions.expand(*rows.shape, -1))
    inputs = q, k, v, s, z, positions, freq, ranges
    o, s, z = causal_dot(*inputs, options=options, padding=padding)
    o = o if rows is None else rows.split(o)
    return o.to(dtype), Sums(s, z)


def absorb(
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    padding: Tensor | None,
    heads: int,
) -> Sums:
    """Return the state after keys and values that no query looks at.

    Args:
        k: [B, T, Hk, D].
        v: [B, T, Hk, E].
        positions: [B or 1, T, L] with an encoding.
        state: The state before these keys.
        setting: How to attend.
        padding: [B, T], True at padding.
        heads: H of the queries.
    """
    k, v = (blank(x, padding) for x in (k, v))
    psi, dk = _streams(k, positions, "k", setting, padding)
    states = heads if per_head(setting.encoding, setting.feature_map) else k.shape[2]
    s, z = reference.absorb(psi, v.to(compute_dtype(v)), dk, states)
    return Sums(s, z) if state is None else Sums(state.s + s, state.z + z)


def readout(
    q: Tensor,
    positions: Tensor | None,
    state: Sums,
    setting: Setting,
    padding: Tensor | None = None,
) -> Tensor:
    """Return the outputs of queries that see a state alone, [B, T, H, E]; 0 at padding.

    Args:
        q: [B, T, H, D].
        positions: [B or 1, T, L] with an encoding.
        state: The state to read.
        setting: How to attend.
        padding: [B, T], True at padding.
    """
    phi, dq = _streams(blank(q, padding), positions, "q", setting, padding)
    options = {"normalize": setting.normalize, "eps": setting.eps, "padding": padding}
    return blank(reference.readout(phi, dq, state.s, state.z, **options), padding)


def _streams(
    x: Tensor, positions: Tensor | None, side: str, setting: Setting, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `features` with zeros at padding; without normaliser its part is empty."""
    x, norm = (blank(y, padding) for y in features(x, positions, side, setting))
    return x, norm if setting.normalize else norm[..., :0]
