"""The state after some tokens, and the check that it belongs to a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import require, shape
from ..backends.specs import compute_dtype
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import FeatureMap


class LinearAttentionState(NamedTuple):
    """All that the tokens so far leave behind: its size is constant, and decoding goes on from it.

    Attributes:
        s: Sum of features (x) values, [B, H, R, E], float32 (float64 for float64 inputs). H counts
            key heads, or query heads if each encodes keys in its own way. For ConvSPE without noise
            the last values follow the sums.
        z: Sum of the normaliser's features, [B, H, Rz]; Rz = 0 without normaliser. For ConvSPE
            without noise the last keys follow the sums.
        length: Number of tokens so far, int64 [B] if it differs between sequences; default
            positions go on from it.
        config: The configuration that the state belongs to; a call with another one refuses it.
        noise: The noise key, int64 [2], of a random encoding or a random feature map; [4] with
            both; else None.
        c: With Favor, [B, H, R]: s and z are relative to it, the sums are s exp(c) and z exp(c).
        lost: After a step of the native backends, the part of the sums that float32 rounded off,
            [B, H, R E + Rz], for s and then z; else None. The next step adds it, so that sums over
            any number of tokens keep their digits. A longer call ignores it.
    """

    s: Tensor
    z: Tensor
    length: int | Tensor
    config: str
    noise: Tensor | None
    c: Tensor | None = None
    lost: Tensor | None = None


def _widths(
    q: Tensor,
    encoding: PositionalEncoding | None,
    feature_map: str | FeatureMap,
    normalize: bool | str,
) -> tuple[int, int]:
    """Return R and Rz, the features of the numerator and of the normaliser, of a state."""
    d = q.shape[-1]
    if not isinstance(feature_map, str):
        r = feature_map.feature_dim(d if encoding is None else encoding.feature_dim)
        return r, r if normalize else 0
    return (d, d if normalize else 0) if encoding is None else encoding.state_widths(normalize)


def check_state(
    state: LinearAttentionState,
    q: Tensor,
    v: Tensor,
    sizes: tuple[int, int],
    features: tuple[PositionalEncoding | None, str | FeatureMap, bool | str],
    expected: str,
    noise: Tensor | None,
) -> None:
    """Check that a state comes from the configuration `expected`, with this noise key.

    Args:
        sizes: Numbers of sequences and of heads.
        features: The encoding, the feature map and `normalize`.
    """
    if not isinstance(state, LinearAttentionState):
        raise TypeError(f"initial_state must be a LinearAttentionState, got {type(state).__name__}")
    if state.config != expected:
        raise ValueError(f"initial_state was made with {state.config}; this call has {expected}")
    length, (r, rz), e = state.length, _widths(q, *features), v.shape[-1]
    if isinstance(length, Tensor):
        if length.dtype != torch.int64 or length.shape != sizes[:1] or length.device != q.device:
            raise ValueError(
                f"initial_state.length must be int64 of shape {sizes[:1]} on {q.device}, got "
                f"{length.dtype} of {shape(length)} on {length.device}"
            )
    elif isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(
            f"initial_state.length must be an int or a tensor, got {type(length).__name__}"
        )
    tensors = [("s", state.s, (*sizes, r, e)), ("z", state.z, (*sizes, rz))]
    if not isinstance(features[1], str) and features[1].route == "favor":
        tensors.append(("c", state.c, (*sizes, r)))
    elif state.c is not None:
        raise ValueError(f"initial_state.c must be None without Favor, got {shape(state.c)}")
    if state.lost is not None:
        tensors.append(("lost", state.lost, (*sizes, r * e + rz)))
    dtype = compute_dtype(q)
    for name, x, size in tensors:
        if not isinstance(x, Tensor) or tuple(x.shape) != size:
            raise ValueError(f"initial_state.{name} must be of shape {size}, got {shape(x)}")
        if x.device != q.device or x.dtype != dtype:
            raise ValueError(
                f"initial_state.{name} must be {dtype} on {q.device}, got {x.dtype} on {x.device}"
            )
    if noise is state.noise:
        return
    if noise is None or not isinstance(state.noise, Tensor) or state.noise.shape != noise.shape:
        raise ValueError(
            "initial_state.noise must be the noise_key of pos_encoding and feature_map, "
            f"{noise}, got {state.noise}"
        )
    require(
        (noise == state.noise.to(noise.device)).all(),
        "initial_state was made with another (seed, step) of noise than pos_encoding or "
        "feature_map has now: "
        "noise stays for a whole sequence, in training too; layers that have one encoding in "
        "common need its share(), and each a feature map of its own",
    )


# states that were saved before this module moved here name it so
LinearAttentionState.__module__ = "fastpe"
