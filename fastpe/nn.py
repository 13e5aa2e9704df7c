"""The attention layers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, distributed
from ._checks import check_dense, check_positive
from .attention.api import causal_linear_attention, causal_linear_attention_step, linear_attention
from .attention.state import LinearAttentionState
from .attention.validation import autocast_dtype, check_options, check_order, check_packing
from .backends.tensors import blank
from .encodings.base import PositionalEncoding
from .feature_maps.base import FeatureMap


class _Attention(nn.Module):
    """Projections and options of multi-head attention."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        value_dim: int | None = None,
        pos_encoding: PositionalEncoding | None = None,
        feature_map: str | FeatureMap = "elu1",
        normalize: bool | str = True,
        eps: float = 1e-6,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = embed_dim if value_dim is None else value_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_heads", num_heads)
        check_positive("num_kv_heads", num_kv_heads)
        for name, value in (("embed_dim", embed_dim), ("value_dim", value_dim)):
            check_positive(name, value)
            if value % num_heads:
                raise ValueError(
                    f"{name} must be divisible by num_heads = {num_heads}, got {value}"
                )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}"
            )
        if pos_encoding is not None and not isinstance(pos_encoding, PositionalEncoding):
            raise TypeError(
                "pos_encoding must be a fastpe.PositionalEncoding, "
                f"got {type(pos_encoding).__name__}"
            )
        feature_map = check_options(feature_map, normalize, eps, None)
        check_order(feature_map, pos_encoding)
        backends.check_name(backend)
        head_dim = embed_dim // num_heads
        if pos_encoding is not None and (
            pos_encoding.head_dim != head_dim or pos_encoding.num_heads not in (None, num_heads)
        ):
            raise ValueError(
                f"pos_encoding must be for head_dim = {head_dim} and num_heads = {num_heads}, got "
                f"{pos_encoding.head_dim} and {pos_encoding.num_heads}"
            )
        if isinstance(feature_map, FeatureMap):
            if feature_map.num_heads not in (None, num_heads):
                raise ValueError(
                    f"feature_map must be for num_heads = {num_heads}, got {feature_map.num_heads}"
                )
            # raises for a width that it does not take
            feature_map.feature_dim(head_dim if pos_encoding is None else pos_encoding.feature_dim)
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.value_dim = embed_dim, num_heads, value_dim
        self.num_kv_heads = num_kv_heads
        share = num_heads // num_kv_heads
        self._widths = embed_dim, embed_dim // share, value_dim // share
        self.in_proj = nn.Linear(embed_dim, sum(self._widths), **factory)
        self.out_proj = nn.Linear(value_dim, embed_dim, **factory)
        self.pos_encoding = pos_encoding
        self.feature_map, self.normalize, self.eps = feature_map, normalize, eps
        self.backend = backend

    def __call__(self, *args: object, **options: object) -> object:
        """Call `forward` through the module's hooks, which must not cast positions."""
        for name in ("positions", "key_positions"):
            if isinstance(options.get(name), Tensor):
                options[name] = _Wrapped(options[name])
        return super().__call__(*args, **options)

    def _check(self, x: Tensor, ndim: int, name: str = "x") -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of floats, got {came}")
        check_dense(name, x)
        # a replaced projection (an adapter, a quantised one) may take other dtypes
        if type(self.in_proj) is nn.Linear and autocast_dtype(x) is None:
            dtype = self.in_proj.weight.dtype
            if x.dtype != dtype:
                raise TypeError(f"{name} must have the dtype of the layer, {dtype}, got {x.dtype}")
        if x.ndim != ndim or x.shape[-1] != self.embed_dim:
            shape = "[B, T, embed_dim]" if ndim == 3 else "[B, embed_dim]"
            raise ValueError(
                f"{name} must be {shape} with embed_dim = {self.embed_dim}, got {tuple(x.shape)}"
            )

    def _project(
        self, x: Tensor, ndim: int, padding: Tensor | None = None, mask: str = "key_padding_mask"
    ) -> tuple[Tensor, ...]:
        """Return q, k and v of x, with padding set to zero first."""
        self._check(x, ndim)
        if padding is not None:
            check_packing(None, padding, x, mask)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        parts = self.in_proj(blank(x, padding)).split(self._widths, dim=-1)
        return tuple(y.unflatten(-1, (h, -1)) for y, h in zip(parts, heads, strict=True))

    def _join(self, o: Tensor, padding: Tensor | None = None) -> Tensor:
        """Project the outputs of all heads to embed_dim; 0 at padding."""
        return blank(self.out_proj(o.flatten(-2)), padding)

    def reset_parameters(self) -> None:
        """Reset the projections, the encoding and the feature map."""
        for part in (self.in_proj, self.out_proj, self.pos_encoding, self.feature_map):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def _resample(self) -> None:
        for part in (self.pos_encoding, self.feature_map):
            if isinstance(part, (PositionalEncoding, FeatureMap)):
                part.maybe_resample_()

    def _options(self) -> dict[str, object]:
        return {
            "pos_encoding": self.pos_encoding,
            "feature_map": self.feature_map,
            "normalize": self.normalize,
            "eps": self.eps,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        """Return the configuration."""
        psi = self.feature_map
        return (
            f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"value_dim={self.value_dim}, feature_map={getattr(psi, 'signature', psi)!r}, "
            f"normalize={self.normalize!r}, backend={self.backend!r}"
        )


class CausalLinearAttention(_Attention):
    """Multi-head causal linear attention with projections: x [B, T, embed_dim] in and out.

    Use it instead of `nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)` with a causal
    mask.

    Args:
        embed_dim: Width of the model.
        num_heads: H; D = embed_dim / num_heads.
        num_kv_heads: Heads Hk of keys and values, a divisor of H; H / Hk heads of queries share
            one. Default H.
        bias: True gives the projections a bias.
        value_dim: Width of all heads' outputs together, H E; default embed_dim.
        pos_encoding: A `fastpe` encoding for (D, H), or None. A random one counts each training
            forward that starts a sequence and redraws its noise as its `resample` says.
        feature_map: Name or module, see `causal_linear_attention`. A random one redraws its noise
            like the encoding.
        normalize: True, False or "abs", see `causal_linear_attention`.
        eps: Epsilon of the normaliser.
        backend: "auto", "cpu", "triton", "cuda" or "reference".
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError, TypeError: an argument is not as above, for instance num_heads does not divide
            embed_dim or value_dim, or pos_encoding is for other heads.
    """

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        initial_state: LinearAttentionState | None = None,
        output_final_state: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor | tuple[Tensor, LinearAttentionState]:
        """Attend over sequences, or over their continuation.

        Args:
            x: [B, T, embed_dim].
            positions: Structure positions, [T], [B, T], [T, L] or [B, T, L]; default time.
            cu_seqlens: [S + 1], sequences packed in one row, see `causal_linear_attention`.
            key_padding_mask: [B, T], True at padding. Padding reaches no other token and no
                gradient, and its outputs are 0.
            initial_state: State after the tokens before these.
            output_final_state: True also returns the state after the last token.
            group: Ranks that hold consecutive slices of the sequence; x is this rank's slice. See
                `fastpe.distributed.causal_linear_attention`. Default: x is the whole sequence.
        Returns:
            y: [B, T, embed_dim]; with output_final_state a pair of y and the state.
        """
        if initial_state is None:
            self._resample()
        options = {
            "positions": _unwrapped(positions),
            "initial_state": initial_state,
            "output_final_state": True,
            **self._options(),
        }
        if group is None:
            options |= {"cu_seqlens": cu_seqlens, "key_padding_mask": key_padding_mask}
            o, state = causal_linear_attention(*self._project(x, 3, key_padding_mask), **options)
        else:
            for name, given in (("cu_seqlens", cu_seqlens), ("key_padding_mask", key_padding_mask)):
                if given is not None:
                    raise ValueError(
                        f"{name} must be None with group: ranks hold one sequence a row"
                    )
            o, state = distributed.causal_linear_attention(
                *self._project(x, 3), group=group, **options
            )
        y = self._join(o, key_padding_mask)
        return (y, state) if output_final_state else y

    def step(
        self, x: Tensor, state: LinearAttentionState, *, positions: Tensor | float | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Attend with one more token; return y [B, embed_dim] and the new state.

        Args:
            x: [B, embed_dim].
            state: State after the tokens before.
            positions: Position of the token, see `causal_linear_attention_step`.
        """
        o, state = causal_linear_attention_step(
            *self._project(x, 2), state, positions=positions, **self._options()
        )
        return self._join(o), state


class LinearAttention(_Attention):
    """Multi-head linear attention that is not causal, of a sequence to itself or to another.

    Use it instead of `nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)` without a
    causal mask, in encoders and between decoder and encoder.

    Arguments are those of `CausalLinearAttention`, and so are errors. embed_dim is the width of
    both sequences, and backend computes the features.
    """

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_cu_seqlens: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every token of x to every one of context.

        Arguments named key_ describe context. Without context, x is both: give positions,
        cu_seqlens and the padding mask once, under either name.

        Args:
            x: Source of queries, [B, T, embed_dim].
            context: Source of keys and values, [B, Tc, embed_dim]; default x.
            positions: Positions of x, [T], [B, T], [T, L] or [B, T, L]; default time, 0, 1, 2, ...
            key_positions: Positions of context, alike; give both or neither.
            cu_seqlens: [S + 1], sequences of x packed in one row, see `linear_attention`.
            key_cu_seqlens: Sequences of context, alike.
            query_padding_mask: [B, T], True at padding of x, whose outputs are 0.
            key_padding_mask: [B, Tc], True at padding of context. Padding reaches no other token
                and no gradient.
        Returns:
            y: [B, T, embed_dim].
        """
        self._resample()
        positions, key_positions = _unwrapped(positions), _unwrapped(key_positions)
        if context is None:
            positions = key_positions = _one("positions", positions, key_positions)
            cu_seqlens = key_cu_seqlens = _one("cu_seqlens", cu_seqlens, key_cu_seqlens)
            padding = _one("key_padding_mask", key_padding_mask, query_padding_mask)
            query_padding_mask = key_padding_mask = padding
            q, k, v = self._project(x, 3, padding)
        else:
            self._check(context, 3, "context")
            # project in full and drop parts: in_proj may be a wrapper that is more than its weight
            q, _, _ = self._project(x, 3, query_padding_mask, "query_padding_mask")
            _, k, v = self._project(context, 3, key_padding_mask)
            if len(k) != len(q):
                raise ValueError(f"context must have x's batch of {len(q)}, got {len(k)}")
        o = linear_attention(
            *(q, k, v),
            positions=positions,
            key_positions=key_positions,
            cu_seqlens=cu_seqlens,
            key_cu_seqlens=key_cu_seqlens,
            query_padding_mask=query_padding_mask,
            key_padding_mask=key_padding_mask,
            **self._options(),
        )
        return self._join(o, query_padding_mask)


class _Wrapped:
    """Positions, hidden from hooks that cast every float tensor, such as FSDP2's."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions


def _unwrapped(positions: Tensor | _Wrapped | None) -> Tensor | None:
    return positions.positions if isinstance(positions, _Wrapped) else positions


def _one(name: str, x: Tensor | None, same: Tensor | None) -> Tensor | None:
    if x is not None and same is not None and x is not same:
        raise ValueError(f"{name} must be given once without context, got it under both names")
    return same if x is None else x
