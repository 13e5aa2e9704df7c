"""Causal linear attention with positional encodings: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, reference
from .encoded import encoded
from .encodings import PositionalEncoding
from .favor import Favor, favor_attention
from .feature_maps import FeatureMap, as_feature_map
from .maps import Rotation, SineMap
from .ops import ScanOptions, causal_dot, compute_dtype, phase_features, step
from .validation import (
    LinearAttentionState,
    check_encoding,
    check_feature_map,
    check_inputs,
    check_options,
    check_positions,
    check_state,
    check_step_positions,
    config,
    kernel_widths,
    shape,
)

_NORMALIZE = {False: "none", True: "sum", "abs": "abs"}


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pos_encoding: PositionalEncoding | None = None,
    positions: Tensor | None = None,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool | str = True,
    eps: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Causal attention whose cost is linear in T, with a relative positional encoding.

    o_m = sum_{n<=m} (phi_m . psi_n) v_n / (sum_{n<=m} phi_m . psi_n + eps), where phi and psi are
    the features of q and k: the encoding's, then the feature map's (RoPE with apply="after" the
    other way round, and not in the normaliser). Arithmetic is float32, for float64 inputs float64.

    Args:
        q: Queries, [B, T, H, D], any strides; float32, float64, bfloat16 or float16.
        k: Keys, [B, T, H, D].
        v: Values, [B, T, H, E].
        pos_encoding: RoPE, RoPEPool, SineSPE, FStripe or one of your own; default none.
        positions: [T] or [B, T], for an encoding of L levels [T, L] or [B, T, L]; any finite
            numbers, in any order; default 0, 1, 2, ... continued from initial_state.
        feature_map: "elu1", "relu", "exp", "identity", "dpfp", "taylor2", or a module: Favor, DPFP,
            Taylor2, Hedgehog, or a FeatureMap of your own. Modules see encoded queries and keys, so
            RoPE and RoPEPool need apply="before" with them.
        normalize: Divide by the sum of weights. True adds eps to it, which needs weights >= 0, so
            not feature_map="identity"; "abs" divides by max(|sum|, eps); False does not divide.
            Favor needs True, and no eps.
        eps: Added to the sum of weights, or its least magnitude with "abs".
        initial_state: State after the tokens before these, from the same configuration.
        output_final_state: Return the state after the last token too.
        chunk_size: Tokens that are handled together; changes speed and rounding only. Default:
            the backend's choice.
        backend: "auto", "cpu", "triton", "cuda" or "reference". Only "auto" falls back, and says so
            once.
    Returns:
        o: [B, T, H, E] in v's dtype; with output_final_state a pair of o and the state.
    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    check_inputs(q, k, v)
    feature_map = as_feature_map(feature_map)
    check_options(feature_map, normalize, eps, chunk_size)
    check_encoding(pos_encoding, q)
    check_feature_map(feature_map, pos_encoding, q)
    made_with = config(pos_encoding, feature_map, normalize)
    noise = None if pos_encoding is None else pos_encoding.noise_key
    if isinstance(feature_map, FeatureMap):
        noise = feature_map.state_noise(noise)
    if initial_state is not None:
        check_state(initial_state, q, v, pos_encoding, feature_map, normalize, made_with, noise)
    start = 0 if initial_state is None else initial_state.length
    positions = check_positions(positions, pos_encoding, q, start)
    widths = kernel_widths(q, v, pos_encoding, feature_map)
    one_token = q.shape[1] == 1 and initial_state is not None
    dtype = compute_dtype(q) if isinstance(feature_map, FeatureMap) else q.dtype
    backend = backends.resolve(backend, q.device, dtype, widths, one_token)

    inputs = q, k, v, positions, pos_encoding, feature_map, normalize, eps, initial_state
    # arithmetic is float32 at least, whatever autocast makes of matrix products
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            o, s, z, *c = _attend(*inputs, chunk_size, backend)
    else:
        o, s, z, *c = _attend(*inputs, chunk_size, backend)
    if not output_final_state:
        return o
    return o, LinearAttentionState(s, z, start + q.shape[1], made_with, noise, *c)


def causal_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    pos_encoding: PositionalEncoding | None = None,
    positions: Tensor | float | None = None,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool | str = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState]:
    """Attend with one more token, in time and memory that do not depend on the tokens before.

    The same as the last token of `causal_linear_attention`, whose arguments these are.

    Args:
        q: Query, [B, H, D].
        k: Key, [B, H, D].
        v: Value, [B, H, E].
        state: State after the tokens before; it is not changed.
        positions: A number or [B], for an encoding of L levels [L] or [B, L]; default
            state.length.
    Returns:
        o: [B, H, E] in v's dtype.
        state: State after this token.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(f"{name} must be one token, [B, H, D], got {shape(x)}")
    if not isinstance(state, LinearAttentionState):
        raise TypeError(f"state must be a LinearAttentionState, got {type(state).__name__}")
    if positions is not None:
        positions = check_step_positions(positions, pos_encoding)
    o, state = causal_linear_attention(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        pos_encoding=pos_encoding,
        positions=positions,
        feature_map=feature_map,
        normalize=normalize,
        eps=eps,
        initial_state=state,
        output_final_state=True,
        backend=backend,
    )
    return o.squeeze(1), state


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    encoding: PositionalEncoding | None,
    feature_map: str | FeatureMap,
    normalize: bool | str,
    eps: float,
    state: LinearAttentionState | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return o and the final s and z, for Favor c: features by the encoding's maps, the scan."""
    dtype = v.dtype
    if backend == "reference" or isinstance(feature_map, FeatureMap):
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    maps = None if encoding is None else encoding.position_maps(q.device)
    if encoding is not None and maps is None:
        q, k = (_encoded(encoding, x, positions, side) for x, side in ((q, "q"), (k, "k")))
    map_q, map_k = maps or (None, None)
    if isinstance(feature_map, FeatureMap):
        sides = (q, positions, map_q, backend), (k, positions, map_k, backend)
        o, *final = _attend_mapped(*sides, v, feature_map, normalize, eps, state, chunk_size)
        return o.to(dtype), *final
    state = None if state is None else (state.s, state.z)
    if backend == "reference":
        # everything by reference.py: differentiable any number of times
        q, dq = reference.features(q, positions, map_q, feature_map)
        k, dk = reference.features(k, positions, map_k, feature_map)
        if not normalize:
            dq, dk = dq[..., :0], dk[..., :0]
        options = {"normalize": normalize, "eps": eps, "state": state, "chunk_size": chunk_size}
        o, (s, z) = reference.chunked(q, k, v, dq, dk, **options)
        return o.to(dtype), s, z
    # rotations are fused into the scan; everything else makes features first
    rotation = map_q if isinstance(map_q, Rotation) else None
    options = ScanOptions(
        feature_map=feature_map,
        normalize=_NORMALIZE[normalize],
        eps=float(eps),
        interleaved=rotation is not None and rotation.interleaved,
        pool=rotation is not None and rotation.pool,
        map_first=rotation is None or rotation.map_first,
        scale=1.0 if rotation is None else rotation.scale,
        chunk=chunk_size or 0,
        backend=backend,
    )
    if q.shape[1] == 1 and state is not None:
        done = step(q, k, v, *state, positions=positions, maps=maps, options=options)
        if done is not None:
            return done
    if isinstance(map_q, SineMap):
        q = phase_features(q, positions, map_q, backend=backend)
        k = phase_features(k, positions, map_k, backend=backend)
    where = (None, None) if rotation is None else (positions, rotation.freq)
    return causal_dot(q, k, v, *(state or (None, None)), *where, options=options)


def _attend_mapped(
    side_q: tuple,
    side_k: tuple,
    v: Tensor,
    feature_map: FeatureMap,
    normalize: bool | str,
    eps: float,
    state: LinearAttentionState | None,
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    """Return the same for features by a module; a side is the arguments of `encoded`."""
    backend = side_q[-1]
    if isinstance(feature_map, Favor):
        # what all features of a query have in common cancels
        a, _ = feature_map.exponents(*side_q)
        b, half_square = feature_map.exponents(*side_k)
        before = None if state is None else (state.s, state.z, state.c)
        return favor_attention(a, b - half_square, v, before, chunk_size, backend)
    q, k = (_mapped(feature_map, encoded(*side)) for side in (side_q, side_k))
    return _attend(q, k, v, None, None, "identity", normalize, eps, state, chunk_size, backend)


def _mapped(feature_map: FeatureMap, x: Tensor) -> Tensor:
    # features of a map that may not be ours: what the kernels rely on is checked
    y = feature_map(x)
    wanted = (*x.shape[:-1], feature_map.feature_dim(x.shape[-1]))
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        raise ValueError(f"feature_map must return {wanted} on {x.device}, got {shape(y)}")
    return y.to(x.dtype)


def _encoded(encoding: PositionalEncoding, x: Tensor, positions: Tensor, side: str) -> Tensor:
    # features of an encoding that is not ours: what the kernels rely on is checked
    y = encoding.features(x, positions, side)
    wanted = (*x.shape[:-1], encoding.feature_dim)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted or y.device != x.device:
        raise ValueError(
            f"pos_encoding.features must return {wanted} on {x.device}, got {shape(y)}"
        )
    return y.to(x.dtype)
