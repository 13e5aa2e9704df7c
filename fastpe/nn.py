"""The attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import backends
from .attention import (
    LinearAttentionState,
    causal_linear_attention,
    causal_linear_attention_step,
)
from .checks import check_positive
from .encodings import PositionalEncoding
from .feature_maps import FeatureMap, as_feature_map
from .validation import check_options, check_order


class CausalLinearAttention(nn.Module):
    """Multi-head causal linear attention with projections: x [B, T, embed_dim] in and out.

    Takes the place of `nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)` called with
    a causal mask.

    Args:
        embed_dim: Width of the model.
        num_heads: H; D = embed_dim / num_heads.
        bias: Of the projections.
        value_dim: Width of all values together, H E; default embed_dim.
        pos_encoding: A `fastpe` encoding for (D, H), or None. A random one redraws its noise at
            each training forward that starts a sequence, as its `resample` says.
        feature_map: Name or module, see `causal_linear_attention`. A random one redraws its noise
            as the encoding does.
        normalize: True, False or "abs", see `causal_linear_attention`.
        eps: Of the normaliser.
        backend: "auto", "cpu" or "reference".
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: embed_dim or value_dim is not divisible by num_heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
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
        check_positive("num_heads", num_heads)
        for name, value in (("embed_dim", embed_dim), ("value_dim", value_dim)):
            check_positive(name, value)
            if value % num_heads:
                raise ValueError(
                    f"{name} must be divisible by num_heads = {num_heads}, got {value}"
                )
        if pos_encoding is not None and not isinstance(pos_encoding, PositionalEncoding):
            raise TypeError(
                "pos_encoding must be a fastpe.PositionalEncoding, "
                f"got {type(pos_encoding).__name__}"
            )
        feature_map = as_feature_map(feature_map)
        check_options(feature_map, normalize, eps, None)
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
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.value_dim = embed_dim, num_heads, value_dim
        self.in_proj = nn.Linear(embed_dim, 2 * embed_dim + value_dim, **factory)
        self.out_proj = nn.Linear(value_dim, embed_dim, **factory)
        self.pos_encoding = pos_encoding
        self.feature_map, self.normalize, self.eps = feature_map, normalize, eps
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        initial_state: LinearAttentionState | None = None,
        output_final_state: bool = False,
    ) -> Tensor | tuple[Tensor, LinearAttentionState]:
        """Attend over a sequence, or over its continuation.

        Args:
            x: [B, T, embed_dim].
            positions: Structure positions, [T], [B, T], [T, L] or [B, T, L]; default time.
            initial_state: State after the tokens before these.
            output_final_state: Return the state after the last token too.
        Returns:
            y: [B, T, embed_dim]; with output_final_state a pair of y and the state.
        """
        if initial_state is None:
            for part in (self.pos_encoding, self.feature_map):
                if isinstance(part, (PositionalEncoding, FeatureMap)):
                    part.maybe_resample_()
        o, state = causal_linear_attention(
            *self._project(x, 3),
            positions=positions,
            initial_state=initial_state,
            output_final_state=True,
            **self._options(),
        )
        y = self.out_proj(o.flatten(-2))
        return (y, state) if output_final_state else y

    def step(
        self, x: Tensor, state: LinearAttentionState, positions: Tensor | float | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Attend with one more token, x [B, embed_dim]; return y [B, embed_dim] and the state.

        Args:
            x: [B, embed_dim].
            state: State after the tokens before.
            positions: As in `causal_linear_attention_step`.
        """
        o, state = causal_linear_attention_step(
            *self._project(x, 2), state, positions=positions, **self._options()
        )
        return self.out_proj(o.flatten(-2)), state

    def _project(self, x: Tensor, ndim: int) -> tuple[Tensor, ...]:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floats, got {came}")
        dtype, device = self.in_proj.weight.dtype, x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if x.dtype != dtype and not autocast:
            raise TypeError(f"x must have the dtype of the layer, {dtype}, got {x.dtype}")
        if x.ndim != ndim or x.shape[-1] != self.embed_dim:
            shape = "[B, T, embed_dim]" if ndim == 3 else "[B, embed_dim]"
            raise ValueError(
                f"x must be {shape} with embed_dim = {self.embed_dim}, got {tuple(x.shape)}"
            )
        q, k, v = self.in_proj(x).split((self.embed_dim, self.embed_dim, self.value_dim), dim=-1)
        return tuple(y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))

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
        return (
            f"{self.embed_dim}, {self.num_heads}, value_dim={self.value_dim}, "
            f"feature_map={self.feature_map!r}, normalize={self.normalize!r}, "
            f"backend={self.backend!r}"
        )
