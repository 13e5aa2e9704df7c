"""The state, and the checks of arguments: everything behind them assumes what they establish."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .encodings import PositionalEncoding
from .feature_maps import FEATURE_MAPS
from .ops import compute_dtype

# up to here float64 holds every integer
_LARGEST_POSITION = 2.0**53
_FINITE = "positions must be finite, at most 2^53 in size"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LinearAttentionState(NamedTuple):
    """What the tokens so far leave behind: constant in size, enough to go on.

    Attributes:
        s: sum of features (x) values, [B, H, R, E], float32 (float64 for float64 inputs).
        z: sum of the normaliser's features, [B, H, Rz]; Rz = 0 without normaliser.
        length: Number of tokens so far; default positions continue from it.
        config: The configuration it belongs to; another one refuses it.
        noise: The noise key of a random encoding, int64 [2], else None.
    """

    s: Tensor
    z: Tensor
    length: int
    config: str
    noise: Tensor | None


def shape(x: object) -> str:
    """Return the shape of a tensor, or the type of anything else, for a message."""
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q and k are [B, T, H, D] and v [B, T, H, E], of one dtype on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            width = "E" if name == "v" else "D"
            raise ValueError(f"{name} must be [B, T, H, {width}], got {shape(x)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v must be [B, T, H, E] with B, T, H of q = {tuple(q.shape[:3])}, got {tuple(v.shape)}"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"head dims must be positive, got D = {q.shape[-1]}, E = {v.shape[-1]}")


def check_options(
    feature_map: str, normalize: bool | str, eps: float, chunk_size: int | None
) -> None:
    """Check the arguments that are no tensors."""
    if feature_map not in FEATURE_MAPS:
        choices = ", ".join(map(repr, FEATURE_MAPS))
        raise ValueError(f"feature_map must be one of {choices}, got {feature_map!r}")
    if normalize not in (True, False, "abs") or not isinstance(normalize, (bool, str)):
        raise ValueError(f"normalize must be True, False or 'abs', got {normalize!r}")
    if feature_map == "identity" and normalize is True:
        raise ValueError(
            "normalize must be 'abs' or False with feature_map='identity', whose weights may add "
            "up to zero, got True"
        )
    is_number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not (is_number and eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")


def check_encoding(encoding: PositionalEncoding | None, q: Tensor) -> None:
    """Check that the encoding is one, and made for the heads of q."""
    if encoding is None:
        return
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(
            f"pos_encoding must be a fastpe.PositionalEncoding, got {type(encoding).__name__}"
        )
    if encoding.head_dim != q.shape[-1]:
        raise ValueError(f"q must have D = {encoding.head_dim} of pos_encoding, got {shape(q)}")
    if encoding.num_heads not in (None, q.shape[2]):
        raise ValueError(f"q must have H = {encoding.num_heads} of pos_encoding, got {shape(q)}")
    for x in encoding.map_inputs():
        if x.device != q.device:
            raise ValueError(f"q must be on pos_encoding's {x.device}, got {q.device}")


def check_positions(
    positions: Tensor | float | None, encoding: PositionalEncoding | None, q: Tensor, start: int
) -> Tensor | None:
    """Return the positions as [B or 1, T, L] in float64; from `start` on by default.

    A number stands for the one position of one token.
    """
    b, t = q.shape[:2]
    if encoding is None:
        if positions is not None:
            raise ValueError("positions must be None without pos_encoding, got positions")
        return None
    levels = encoding.num_levels
    if positions is None:
        if levels > 1:
            raise ValueError(f"positions must be given for a pos_encoding of {levels} levels")
        if t == 1:
            return torch.full((1, 1, 1), start, dtype=torch.float64, device=q.device)
        steps = torch.arange(start, start + t, dtype=torch.float64, device=q.device)
        return steps.view(1, t, 1)
    if type(positions) in (int, float) and t == 1:
        if not abs(positions) <= _LARGEST_POSITION:
            raise ValueError(f"{_FINITE}, got {str(positions)[:20]}")
        return torch.full((1, 1, 1), positions, dtype=torch.float64, device=q.device)
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be a tensor, got {type(positions).__name__}")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be integers or floats, got {positions.dtype}")
    if positions.device != q.device:
        raise ValueError(
            f"positions must be on the device of q, {q.device}, got {positions.device}"
        )
    came = tuple(positions.shape)
    if levels == 1 and came in ((t,), (b, t), (1, t)):
        positions = positions[..., None]
    if positions.ndim == 2:
        positions = positions[None]
    if tuple(positions.shape) not in ((b, t, levels), (1, t, levels)):
        allowed = f"[{t}], [{b}, {t}], " if levels == 1 else ""
        raise ValueError(
            f"positions must be {allowed}[{t}, {levels}] or [{b}, {t}, {levels}], got {came}"
        )
    positions = positions.double()
    if positions.device.type == "cpu":  # on another device the look would wait for it
        _require((positions.detach().abs() <= _LARGEST_POSITION).all(), _FINITE)
    return positions


def _require(condition: Tensor, message: str) -> None:
    # compiled code cannot stop to look: it raises RuntimeError where it is run
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def check_step_positions(
    positions: Tensor | float, encoding: PositionalEncoding | None
) -> Tensor | float:
    """Return the positions of one token for `check_positions`: [B, 1, L], [B, 1], or a number."""
    # anything else is refused where encodings are checked
    levels = encoding.num_levels if isinstance(encoding, PositionalEncoding) else 1
    if not isinstance(positions, Tensor):
        if isinstance(positions, bool) or not isinstance(positions, (int, float)):
            raise TypeError(f"positions must be a tensor or number, got {type(positions).__name__}")
        came, batched = (), False
    else:
        came, batched = tuple(positions.shape), positions.ndim == (1 if levels == 1 else 2)
    if not batched and len(came) != (0 if levels == 1 else 1):
        raise ValueError(
            f"positions must be one position of {levels} level(s), or [B] of them, got shape {came}"
        )
    return positions.unsqueeze(1 if batched else 0) if isinstance(positions, Tensor) else positions


def check_band(feature_map: object, positions: Tensor, start: int | Tensor) -> None:
    """Check what attention by a band of lags needs: the linear kernel, and positions in a row."""
    if feature_map != "identity":
        raise ValueError(
            "feature_map must be 'identity' with ConvSPE(num_realizations=None), which has no "
            f"features, got {feature_map!r}"
        )
    steps = torch.arange(positions.shape[1], device=positions.device)
    start = start[:, None] if isinstance(start, Tensor) else start
    _require(
        (positions[..., 0] == start + steps).all(),
        "positions must be the default ones, 0, 1, 2, ... continued from the state, with "
        "ConvSPE(num_realizations=None)",
    )


def config(encoding: PositionalEncoding | None, feature_map: str, normalize: bool | str) -> str:
    """Return the configuration that a state belongs to, as text."""
    name = "no encoding" if encoding is None else encoding.signature
    return f"{name}, feature_map={feature_map!r}, normalize={normalize!r}"


def check_state(
    state: LinearAttentionState,
    q: Tensor,
    v: Tensor,
    encoding: PositionalEncoding | None,
    normalize: bool | str,
    expected: str,
    noise: Tensor | None,
) -> None:
    """Check that a state comes from the configuration `expected`, with this noise key."""
    if not isinstance(state, LinearAttentionState):
        raise TypeError(f"initial_state must be a LinearAttentionState, got {type(state).__name__}")
    if state.config != expected:
        raise ValueError(f"initial_state was made with {state.config}; this call has {expected}")
    b, _, h, d = q.shape
    r, rz = d, d if normalize else 0
    if encoding is not None:
        r, rz = encoding.state_widths(normalize)
    if isinstance(state.length, bool) or not isinstance(state.length, (int, torch.SymInt)):
        raise TypeError(f"initial_state.length must be an int, got {type(state.length).__name__}")
    for name, x, size in (("s", state.s, (b, h, r, v.shape[-1])), ("z", state.z, (b, h, rz))):
        if not isinstance(x, Tensor) or tuple(x.shape) != size:
            raise ValueError(f"initial_state.{name} must be of shape {size}, got {shape(x)}")
        if x.device != q.device or x.dtype != compute_dtype(q):
            raise ValueError(
                f"initial_state.{name} must be {compute_dtype(q)} on {q.device}, "
                f"got {x.dtype} on {x.device}"
            )
    if noise is state.noise:
        return
    if noise is None or not isinstance(state.noise, Tensor) or state.noise.shape != noise.shape:
        raise ValueError(
            f"initial_state.noise must be the noise_key of pos_encoding, {noise}, got {state.noise}"
        )
    _require(
        (noise == state.noise.to(noise.device)).all(),
        "initial_state was made with another (seed, step) of noise than pos_encoding has now: "
        "noise stays for a whole sequence, in training too; layers that have one encoding in "
        "common need its share()",
    )
