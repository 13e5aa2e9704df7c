"""Checks of arguments, on which the code behind relies; state.py checks states."""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
from torch import Tensor

from .._checks import check_dense, check_position_dtype, require, shape
from .._torch import observed
from ..backends.reference.elementwise import FEATURE_MAPS
from ..encodings.base import PositionalEncoding
from ..feature_maps.base import WIDE_MAPS, FeatureMap
from .packing import ROWS, Packing

# up to here float64 holds every integer
_LARGEST_POSITION = 2.0**53
_FINITE = "must be finite, at most 2^53 in size"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_SHAPES = {"q": "[B, T, H, D]", "k": "[B, T, Hk, D]", "v": "[B, T, Hk, E]"}


_NOTHING = contextlib.nullcontext()


def autocast_dtype(x: object) -> torch.dtype | None:
    """Return the dtype autocast uses on the device of x, or None if autocast is off."""
    if not isinstance(x, Tensor):
        return None
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _lowered(x: object, dtype: torch.dtype) -> object:
    is_float = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if is_float else x


def take_inputs(
    q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, contextlib.AbstractContextManager]:
    """Return q, k and v, checked, and the context to compute in.

    Under autocast they get its dtype, as `F.scaled_dot_product_attention` takes them, unless they
    are float64; the context then turns autocast off, so that our own products keep their dtype.
    """
    dtype, context = autocast_dtype(q), _NOTHING
    if dtype is not None:
        q, k, v = (_lowered(x, dtype) for x in (q, k, v))
        context = torch.autocast(q.device.type, enabled=False)
    check_inputs(q, k, v)
    return q, k, v, context


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q is [B, T, H, D], k [B, Tk, Hk, D], v [B, Tk, Hk, E], of one dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_nested:
            check_dense(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be {_SHAPES[name]}, got {shape(x)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if k.shape != q.shape:
        (b, _, h, d), heads = q.shape, k.shape[2]
        if k.shape[0] != b or k.shape[3] != d:
            raise ValueError(
                f"k must be [B, T, Hk, D] with B = {b} and D = {d} of q, got {tuple(k.shape)}"
            )
        if heads != h and (not heads or h % heads):
            raise ValueError(f"k must have a number of heads that divides q's {h}, got {heads}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be [B, T, Hk, E] with B, T, Hk of k = {tuple(k.shape[:3])}, "
            f"got {tuple(v.shape)}"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"head dims must be positive, got D = {q.shape[-1]}, E = {v.shape[-1]}")


def check_options(
    feature_map: str | FeatureMap, normalize: bool | str, eps: float, chunk_size: int | None
) -> str | FeatureMap:
    """Check the arguments that are no tensors; return the feature map, a module if it is wide."""
    if isinstance(feature_map, str):
        if feature_map in WIDE_MAPS:
            feature_map = WIDE_MAPS[feature_map]()
        elif feature_map not in FEATURE_MAPS:
            _refuse_map(feature_map)
    elif not isinstance(feature_map, FeatureMap):
        _refuse_map(feature_map)
    if normalize not in (True, False, "abs") or not isinstance(normalize, (bool, str)):
        raise ValueError(f"normalize must be True, False or 'abs', got {normalize!r}")
    if feature_map == "identity" and normalize is True:
        raise ValueError(
            "normalize must be 'abs' or False with feature_map='identity', whose weights may add "
            "up to zero, got True"
        )
    if normalize is not True and not isinstance(feature_map, str):
        feature_map.check_normalize(normalize)
    is_number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not (is_number and eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    return feature_map


def _refuse_map(feature_map: object) -> None:
    choices = ", ".join(map(repr, (*FEATURE_MAPS, *WIDE_MAPS)))
    raise ValueError(
        f"feature_map must be one of {choices} or a fastpe.FeatureMap, got {feature_map!r}"
    )


def check_encoding(encoding: PositionalEncoding | None, q: Tensor) -> None:
    """Check that the encoding is one, and made for the heads of q."""
    if encoding is None:
        return
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(
            "pos_encoding must be a fastpe.PositionalEncoding, such as fastpe.RoPE(64), got "
            f"{encoding if isinstance(encoding, type) else type(encoding).__name__}"
        )
    if encoding.head_dim != q.shape[-1]:
        raise ValueError(f"q must have D = {encoding.head_dim} of pos_encoding, got {shape(q)}")
    if encoding.num_heads not in (None, q.shape[2]):
        raise ValueError(f"q must have H = {encoding.num_heads} of pos_encoding, got {shape(q)}")
    for x in encoding.map_inputs():
        if x.device != q.device:
            raise ValueError(f"q must be on pos_encoding's {x.device}, got {q.device}")


def check_align(align: str | None, q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check `align`, which must be given if q and k differ in length."""
    if align not in (None, "start", "end"):
        raise ValueError(f"align must be 'end' or 'start', got {align!r}")
    if q.shape[1] == k.shape[1]:
        return
    lengths = f"{k.shape[1]} keys for {q.shape[1]} queries"
    if align is None:
        raise ValueError(
            f"align must be 'end' or 'start' with {lengths}: which query stands at which key? "
            "(Is q [B, H, T, D]? Then give q.transpose(1, 2))"
        )
    if cu_seqlens is not None:
        raise ValueError(f"k must have as many tokens as q with cu_seqlens, got {lengths}")


def check_packing(
    cu_seqlens: Tensor | None,
    padding: Tensor | None,
    x: Tensor,
    mask: str = "key_padding_mask",
    name: str = "cu_seqlens",
) -> Packing:
    """Check bounds and mask; return which tokens of x [B, T, ., .] belong to which sequence."""
    if padding is None and cu_seqlens is None:
        return ROWS
    b, t = x.shape[:2]
    if padding is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{name} and {mask} must not be given both: packed has no padding")
        if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
            came = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
            raise TypeError(f"{mask} must be a bool tensor, True at padding, got {came}")
        if tuple(padding.shape) != (b, t):
            raise ValueError(f"{mask} must be [B, T] = ({b}, {t}), got {shape(padding)}")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {came}")
        if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
            raise ValueError(f"{name} must be [S + 1], got {shape(cu_seqlens)}")
        if b != 1:
            raise ValueError(f"{name} needs sequences packed in one row, B = 1, got B = {b}")
    for given, what in ((padding, mask), (cu_seqlens, name)):
        if given is not None and given.device != x.device:
            raise ValueError(f"{what} must be on the device of q, {x.device}, got {given.device}")
    if cu_seqlens is not None:
        ordered = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == t)
        message = f"{name} must begin with 0, never fall, and end with T = {t}"
        if x.device.type == "cpu" and not observed() and not ordered:
            message += f", got {_misplaced(cu_seqlens.tolist())}"
        require(ordered, message, wait=False)
    return Packing(cu_seqlens, padding)


def _misplaced(bounds: list[int]) -> str:
    """Return in words which of the bounds of packed sequences is wrong."""
    if bounds[0] != 0:
        return f"{bounds[0]} at the beginning"
    for i, (before, after) in enumerate(itertools.pairwise(bounds), 1):
        if after < before:
            return f"{after} after {before} at index {i}"
    return f"{bounds[-1]} at the end"


def check_order(feature_map: str | FeatureMap, encoding: PositionalEncoding | None) -> None:
    """Check that the encoding does not come after a map that is a module."""
    if isinstance(feature_map, FeatureMap) and getattr(encoding, "apply_order", "") == "after":
        raise ValueError(
            f"pos_encoding must have apply='before' with feature_map = {feature_map.signature}, "
            f"got apply='after', which rotates D features: {encoding.signature}"
        )


def check_feature_map(
    feature_map: str | FeatureMap, encoding: PositionalEncoding | None, q: Tensor
) -> None:
    """Check that a map which is a module is made for the encoding and for the heads of q."""
    if not isinstance(feature_map, FeatureMap):
        return
    check_order(feature_map, encoding)
    if feature_map.num_heads not in (None, q.shape[2]):
        raise ValueError(f"q must have H = {feature_map.num_heads} of feature_map, got {shape(q)}")
    for x in (*feature_map.parameters(), *feature_map.buffers()):
        if x.device != q.device:
            raise ValueError(f"q must be on feature_map's {x.device}, got {q.device}")


def check_band(feature_map: object, positions: Tensor | float | None) -> None:
    """Check what attention by a band of lags needs: the linear kernel, and positions in a row."""
    if feature_map != "identity":
        raise ValueError(
            "feature_map must be 'identity' with ConvSPE(num_realizations=None), which has no "
            f"features, got {feature_map!r}"
        )
    if positions is not None:
        raise ValueError(
            "positions must be the default ones, 0, 1, 2, ... of each sequence, with "
            "ConvSPE(num_realizations=None), got positions"
        )


def check_positions(
    positions: Tensor | float | None,
    encoding: PositionalEncoding | None,
    q: Tensor,
    t: int,
    start: int | Tensor,
    packing: Packing,
    name: str = "positions",
) -> Tensor | None:
    """Return the positions of t tokens as [B or 1, T, L] in float64; from `start` on by default.

    A number stands for the one position of one token.
    """
    b = q.shape[0]
    if encoding is None:
        if positions is not None:
            raise ValueError(f"{name} must be None without pos_encoding, got {name}")
        return None
    levels = encoding.num_levels
    if positions is None:
        if levels > 1:
            raise ValueError(f"{name} must be given for a pos_encoding of {levels} levels")
        if packing is ROWS and isinstance(start, int):
            end = start + t
            count = torch.arange(start, end, dtype=torch.float64, device=q.device)
            return count.view(1, t, 1)
        return packing.default_positions(start, t, q.device)
    if type(positions) in (int, float) and t == 1:
        if not abs(positions) <= _LARGEST_POSITION:
            raise ValueError(f"{name} {_FINITE}, got {str(positions)[:20]}")
        return torch.full((1, 1, 1), positions, dtype=torch.float64, device=q.device)
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(positions).__name__}")
    check_dense(name, positions)
    check_position_dtype(name, positions)
    if positions.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {positions.device}")
    came = tuple(positions.shape)
    if levels == 1 and came in ((t,), (b, t), (1, t)):
        positions = positions[..., None]
    if positions.ndim == 2:
        positions = positions[None]
    if tuple(positions.shape) not in ((b, t, levels), (1, t, levels)):
        allowed = f"[{t}], [{b}, {t}], " if levels == 1 else ""
        raise ValueError(
            f"{name} must be {allowed}[{t}, {levels}] or [{b}, {t}, {levels}], got {came}"
        )
    positions = positions.double()
    if packing.padding is not None:  # whatever stands there
        positions = positions.masked_fill(packing.padding.unsqueeze(-1), 0)
    if positions.device.type == "cpu":  # on another device the look would wait for it
        require((positions.detach().abs() <= _LARGEST_POSITION).all(), f"{name} {_FINITE}")
    return positions


def check_step_positions(
    positions: Tensor | float, encoding: PositionalEncoding | None, b: int
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
    one = () if levels == 1 else (levels,)
    if came not in (one, (1, *one), (b, *one)):
        forms = f"a number or [{b}]" if levels == 1 else f"[{levels}] or [{b}, {levels}]"
        raise ValueError(f"positions must be {forms}, got shape {came}")
    return positions.unsqueeze(1 if batched else 0) if isinstance(positions, Tensor) else positions
