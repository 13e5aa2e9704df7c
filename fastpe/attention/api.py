"""The public functions."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from .. import backends
from .._checks import shape
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import FeatureMap
from . import banded, favor, linear, packing
from .aligned import attend_aligned
from .call import Setting, Sums, config, noise_in_use, per_head
from .packing import ROWS
from .state import LinearAttentionState, check_state
from .validation import (
    check_align,
    check_band,
    check_encoding,
    check_feature_map,
    check_options,
    check_packing,
    check_positions,
    check_step_positions,
    take_inputs,
)

_ROUTES = {"linear": linear, "favor": favor, "banded": banded}


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
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    align: str | None = None,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Causal attention whose cost is linear in T, with a relative positional encoding.

    o_m = sum_{n<=m} (phi_m . psi_n) v_n / (sum_{n<=m} phi_m . psi_n + eps). phi and psi are the
    features of q and k: the encoding acts first, then the feature map. RoPE with apply="after" acts
    after the feature map, and not in the normaliser. The arithmetic is float32, or float64 for
    float64 inputs. q, k and v must have one dtype. Under autocast they are first cast to its dtype,
    as `F.scaled_dot_product_attention` does; float64 stays.

    Args:
        q: Queries, [B, T, H, D], any strides; float32, float64, bfloat16 or float16.
        k: Keys, [B, T, Hk, D]; Hk divides H, and each H / Hk neighbouring heads of q share a head
            of k and v. If the encoding has parameters for each of H heads, each head of q sees its
            own features of these keys.
        v: Values, [B, T, Hk, E].
        pos_encoding: RoPE, RoPEPool, SineSPE, ConvSPE, FStripe or your own; default none.
        positions: Positions, [T] or [B, T]; for an encoding of L levels [T, L] or [B, T, L]. Any
            finite numbers in any order: integers, bools, float32 or float64. The default counts
            0, 1, 2, ... in each sequence and goes on from initial_state. If k and q differ in
            length, give the positions of the longer one.
        feature_map: "elu1", "relu", "exp", "identity", "dpfp", "taylor2", or a module: Favor, DPFP,
            Taylor2, Hedgehog or your own FeatureMap. Modules see encoded queries and keys, so RoPE
            and RoPEPool need apply="before" with them.
        normalize: How to divide by the sum of weights. True divides by sum + eps, which needs
            weights >= 0, so not feature_map="identity". "abs" divides by max(|sum|, eps). False
            does not divide. Favor needs True and ignores eps.
        eps: Number added to the sum of weights, or its least magnitude with "abs".
        cu_seqlens: Bounds of packed sequences, int32 or int64 [S + 1] from 0 to T, with B = 1.
            Sequence i has the tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1, and gets the result
            that it has alone.
        key_padding_mask: [B, T of k], True at padding, on any side. Padded tokens change nothing,
            whatever they hold, and their outputs are 0.
        align: Which query stands at which key if their numbers differ; then you must give it. "end"
            puts the last at the last, for decoding with all keys at hand. "start" puts the first at
            the first, as is_causal of scaled_dot_product_attention does.
        initial_state: State after the tokens before these, from the same configuration.
        output_final_state: Return the state after the last token too.
        chunk_size: Number of tokens that are processed together; it changes speed and rounding
            only. Default: the backend's choice.
        backend: "auto", "cpu", "triton", "cuda" or "reference". Only "auto" falls back, and it
            warns once.
    Returns:
        o: [B, T, H, E] in v's dtype. With output_final_state a pair of o and the state: of B or S
            sequences and Hk heads, or H heads if each encodes keys in its own way.
    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the named backend cannot run here.
    """
    q, k, v, context = take_inputs(q, k, v)
    feature_map = check_options(feature_map, normalize, eps, chunk_size)
    check_encoding(pos_encoding, q)
    route = choose(pos_encoding, feature_map)
    if route is banded:
        check_band(feature_map, positions)
    elif not isinstance(feature_map, str):
        check_feature_map(feature_map, pos_encoding, q)
    (b, t, h, _), tk, tokens = q.shape, k.shape[1], ROWS
    if t != tk or align is not None:
        check_align(align, q, k, cu_seqlens)
    if cu_seqlens is not None or key_padding_mask is not None:
        tokens = check_packing(cu_seqlens, key_padding_mask, k)
    dtype, widths = route.kernel_sizes(q, v, pos_encoding, feature_map)
    # a bool where T is a symbol too
    one_token = bool(initial_state is not None and t == 1)
    backend = backends.resolve(backend, q.device, dtype, widths, one_token)
    state, start = None, 0
    if initial_state is not None or output_final_state:
        made_with = config(pos_encoding, feature_map, normalize)
        noise = noise_in_use(pos_encoding, feature_map)
    if initial_state is not None:
        heads = h if per_head(pos_encoding, feature_map) else k.shape[2]
        sizes = b if cu_seqlens is None else cu_seqlens.shape[0] - 1, heads
        features = pos_encoding, feature_map, normalize
        check_state(initial_state, q, v, sizes, features, made_with, noise)
        s, z, start, _, _, c, lost = initial_state
        state = Sums(s, z, c, lost)
    counted = tokens if t == tk else tokens.along(max(t, tk), align)
    positions = check_positions(positions, pos_encoding, q, max(t, tk), start, counted)
    with context:
        maps = None if pos_encoding is None else pos_encoding.make_maps(q.device)
        how = pos_encoding, feature_map, normalize, eps, chunk_size, backend, route, maps
        inputs = q, k, v, positions, state, Setting(*how), tokens
        o, state = route.attend(*inputs) if t == tk else attend_aligned(*inputs, align)
    if not output_final_state:
        return o
    # positions go on behind the last token, also of queries that stand before all keys
    if counted is ROWS:
        length = t if align == "end" and t > tk else tk
    else:
        length = counted.lengths(t) if align == "end" and t > tk else tokens.lengths(tk)
    s, z, c, lost = state
    return o, LinearAttentionState(s, z, start + length, made_with, noise, c, lost)


def choose(encoding: PositionalEncoding | None, feature_map: str | FeatureMap) -> ModuleType:
    """Return the route of a call: the module of this folder that attends."""
    if encoding is not None and encoding.route != "linear":
        return _ROUTES[encoding.route]
    return linear if isinstance(feature_map, str) else _ROUTES[feature_map.route]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pos_encoding: PositionalEncoding | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool | str = True,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    key_cu_seqlens: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to every key, in O(T): for encoders and between sequences.

    o_m = sum_n (phi_m . psi_n) v_n / (sum_n phi_m . psi_n + eps), with the features of
    `causal_linear_attention`, whose arguments these are unless listed. There is nothing to scan.
    PyTorch stores the features and multiplies matrices in float32, or float64 for float64 inputs.

    Args:
        q: Queries, [B, Tq, H, D].
        k: Keys, [B, Tk, Hk, D].
        v: Values, [B, Tk, Hk, E].
        positions: Positions of the queries; default 0, 1, 2, ... in each sequence.
        key_positions: Positions of the keys; give both or neither. If keys and queries are the same
            tokens, give the same positions.
        cu_seqlens: Bounds of packed queries, [S + 1] from 0 to Tq, with B = 1. The longest is read
            on the host, which synchronises with a GPU.
        key_cu_seqlens: Bounds of packed keys; default cu_seqlens.
        query_padding_mask: [B, Tq], True at padding, whose outputs are 0.
        key_padding_mask: [B, Tk], True at padding.
        backend: Backend that makes the features.
    Returns:
        o: [B, Tq, H, E] in v's dtype.
    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the named backend cannot run here.
    """
    q, k, v, context = take_inputs(q, k, v)
    feature_map = check_options(feature_map, normalize, eps, None)
    check_encoding(pos_encoding, q)
    check_feature_map(feature_map, pos_encoding, q)
    route = choose(pos_encoding, feature_map)
    name = "cu_seqlens" if key_cu_seqlens is None else "key_cu_seqlens"
    if key_cu_seqlens is None:
        key_cu_seqlens = cu_seqlens
    of_q = check_packing(cu_seqlens, query_padding_mask, q, "query_padding_mask")
    of_k = check_packing(key_cu_seqlens, key_padding_mask, k, name=name)
    if (cu_seqlens is None) != (key_cu_seqlens is None) or (
        cu_seqlens is not None and cu_seqlens.shape != key_cu_seqlens.shape
    ):
        raise ValueError("cu_seqlens and key_cu_seqlens must be of as many sequences")
    if (positions is None) != (key_positions is None):
        raise ValueError(
            "positions and key_positions must be given both or neither: are queries and keys the "
            "same tokens?"
        )
    at_q = check_positions(positions, pos_encoding, q, q.shape[1], 0, of_q)
    at_k = check_positions(key_positions, pos_encoding, q, k.shape[1], 0, of_k, "key_positions")
    dtype, widths = route.kernel_sizes(q, v, pos_encoding, feature_map)
    backend, heads = backends.resolve(backend, q.device, dtype, widths), q.shape[2]
    with context:
        maps = None if pos_encoding is None else pos_encoding.make_maps(q.device)
        how = pos_encoding, feature_map, normalize, eps, None, backend, route, maps
        setting, padding = Setting(*how), (query_padding_mask, key_padding_mask)
        if cu_seqlens is not None:
            pad_q, pad_k = packing.Padded(cu_seqlens), packing.Padded(key_cu_seqlens)
            k, v, at_k = (None if x is None else pad_k.split(x) for x in (k, v, at_k))
            q, at_q = (None if x is None else pad_q.split(x) for x in (q, at_q))
            padding = pad_q.padding, pad_k.padding
        state = route.absorb(k, v, at_k, None, setting, padding[1], heads)
        o = route.readout(q, at_q, state, setting, padding[0]).to(v.dtype)
        return o if cu_seqlens is None else pad_q.join(o)


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
    """Attend with one more token, at a cost that does not depend on the tokens before.

    The result is that of the last token of `causal_linear_attention`, whose arguments these are
    unless listed.

    Args:
        q: Query, [B, H, D].
        k: Key, [B, Hk, D].
        v: Value, [B, Hk, E].
        state: State after the tokens before; it is not changed.
        positions: A number or [B]; for an encoding of L levels [L] or [B, L]. Default state.length,
            which may differ between sequences.
    Returns:
        o: [B, H, E] in v's dtype.
        state: State after this token.
    Raises:
        ValueError, TypeError: an argument is not as above or there.
        RuntimeError: the named backend cannot run here.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(f"{name} must be one token, [B, H, D], got {shape(x)}")
    if not isinstance(state, LinearAttentionState):
        raise TypeError(
            "state must be a LinearAttentionState, as a call with output_final_state=True returns "
            f"(T may be 0), got {type(state).__name__}"
        )
    if positions is not None:
        positions = check_step_positions(positions, pos_encoding, q.shape[0])
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
