"""Causal linear attention with positional encodings: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, reference
from .encodings import PositionalEncoding
from .maps import Rotation, SineMap
from .ops import ScanOptions, causal_dot, compute_dtype, phase_features
from .validation import (
    LinearAttentionState,
    check_encoding,
    check_inputs,
    check_options,
    check_positions,
    check_state,
    check_step_positions,
    config,
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
    feature_map: str = "elu1",
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
        feature_map: "elu1", "relu", "exp" or "identity".
        normalize: Divide by the sum of weights. True adds eps to it, which needs weights >= 0, so
            not feature_map="identity"; "abs" divides by max(|sum|, eps); False does not divide.
        eps: Added to the sum of weights, or its least magnitude with "abs".
        initial_state: State after the tokens before these, from the same configuration.
        output_final_state: Return the state after the last token too.
        chunk_size: Tokens that are handled together; changes speed and rounding only. Default:
            the backend's choice.
        backend: "auto", "cpu" or "reference". Only "auto" falls back, and says so once.
    Returns:
        o: [B, T, H, E] in v's dtype; with output_final_state a pair of o and the state.
    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    check_inputs(q, k, v)
    check_options(feature_map, normalize, eps, chunk_size)
    check_encoding(pos_encoding, q)
    made_with = config(pos_encoding, feature_map, normalize)
    noise = None if pos_encoding is None else pos_encoding.noise_key
    if initial_state is not None:
        check_state(initial_state, q, v, pos_encoding, normalize, made_with, noise)
    start = 0 if initial_state is None else initial_state.length
    positions = check_positions(positions, pos_encoding, q, start)
    backend = backends.resolve(backend, q.device)

    inputs = (q, k, v, positions, pos_encoding, feature_map, normalize, eps, initial_state)
    run = _reference if backend == "reference" else _fused
    # arithmetic is float32 at least, whatever autocast makes of matrix products
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            o, s, z = run(*inputs, chunk_size, backend)
    else:
        o, s, z = run(*inputs, chunk_size, backend)
    if not output_final_state:
        return o
    return o, LinearAttentionState(s, z, start + q.shape[1], made_with, noise)


def causal_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    pos_encoding: PositionalEncoding | None = None,
    positions: Tensor | float | None = None,
    feature_map: str = "elu1",
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


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    encoding: PositionalEncoding | None,
    feature_map: str,
    normalize: bool | str,
    eps: float,
    state: LinearAttentionState | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything by reference.py: differentiable any number of times."""
    dtype = compute_dtype(q)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    map_q, map_k = _maps(encoding, q.device)
    if encoding is not None and map_q is None:
        q, k = encoding.features(q, positions, "q"), encoding.features(k, positions, "k")
    q, dq = reference.features(q, positions, map_q, feature_map)
    k, dk = reference.features(k, positions, map_k, feature_map)
    if not normalize:
        dq, dk = dq[..., :0], dk[..., :0]
    o, (s, z) = reference.chunked(
        q,
        k,
        values,
        dq,
        dk,
        normalize=normalize,
        eps=eps,
        state=None if state is None else (state.s, state.z),
        chunk_size=chunk_size,
    )
    return o.to(v.dtype), s, z


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    encoding: PositionalEncoding | None,
    feature_map: str,
    normalize: bool | str,
    eps: float,
    state: LinearAttentionState | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations are fused into the scan; everything else makes features first."""
    rotation, (map_q, map_k) = None, _maps(encoding, q.device)
    if isinstance(map_q, Rotation):
        rotation = map_q
    elif map_q is not None:
        q = phase_features(q, positions, map_q, backend=backend)
        k = phase_features(k, positions, map_k, backend=backend)
    elif encoding is not None:
        q, k = encoding.features(q, positions, "q"), encoding.features(k, positions, "k")
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
    s0, z0 = (None, None) if state is None else (state.s, state.z)
    where = (None, None) if rotation is None else (positions, rotation.freq)
    return causal_dot(q, k, v, s0, z0, *where, options=options)


def _maps(
    encoding: PositionalEncoding | None, device: torch.device
) -> tuple[Rotation | SineMap | None, Rotation | SineMap | None]:
    maps = None if encoding is None else encoding.position_maps(device)
    return (None, None) if maps is None else maps
