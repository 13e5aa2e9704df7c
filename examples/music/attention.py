"""Attention layers with one interface: fastpe's, softmax with a cache, and the literature's.

Each takes x [B, T, dim] and positions [B, T, L] and returns y [B, T, dim] and a state; those that
can go on from it have `step`, for x [B, dim] and positions [B, L].
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

import fastpe

Cache = tuple[Tensor, Tensor, int]
# tokens by which a full cache grows
_ROOM = 256


class LinearAttention(nn.Module):
    """`fastpe.nn.CausalLinearAttention`; its state has one size however many tokens came.

    Args:
        dim: Width of the model.
        heads: H.
        encoding: For (dim / H, H), or None.
        feature_map: Name or module.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        encoding: fastpe.PositionalEncoding | None,
        feature_map: str | fastpe.FeatureMap,
    ) -> None:
        super().__init__()
        self.layer = fastpe.nn.CausalLinearAttention(
            dim, heads, pos_encoding=encoding, feature_map=feature_map
        )

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return y and the state after the last token."""
        return self.layer(x, positions=self._given(positions), output_final_state=True)

    def step(
        self, x: Tensor, positions: Tensor, state: fastpe.LinearAttentionState
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return y for one more token, and the state after it."""
        return self.layer.step(x, state, positions=self._given(positions))

    def _given(self, positions: Tensor) -> Tensor | None:
        encoding = self.layer.pos_encoding
        if encoding is None:
            return None
        return positions.squeeze(-1) if encoding.num_levels == 1 else positions


class _Projected(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, D]
        return tuple(y.unflatten(-1, (self.heads, -1)) for y in self.in_proj(x).chunk(3, -1))


class SoftmaxAttention(_Projected):
    """Softmax attention; its state is a cache of all keys and values, and the number of tokens.

    Keys and values, [B, H, room, D], have room ahead, which `step` writes into: from one state a
    sequence goes on in one way only.

    Args:
        dim: Width of the model.
        heads: H.
        encoding: RoPE, which turns queries and keys, or None.
    """

    def __init__(self, dim: int, heads: int, encoding: fastpe.RoPE | None) -> None:
        super().__init__(dim, heads)
        self.encoding = encoding

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Cache]:
        """Return y and the cache of all tokens."""
        q, k, v = self._encoded(x, positions)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(o.transpose(1, 2).flatten(-2)), (k, v, x.shape[1])

    def step(self, x: Tensor, positions: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """Return y for one more token, and the cache with its key and value."""
        q, *new = self._encoded(x[:, None], positions[:, None])
        *caches, length = state
        if length == caches[0].shape[2]:
            # so that not every step copies the whole cache
            caches = [F.pad(cache, (0, 0, 0, _ROOM)) for cache in caches]
        for cache, last in zip(caches, new, strict=True):
            cache[:, :, length] = last[:, :, 0]
        k, v = (cache[:, :, : length + 1] for cache in caches)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(o.flatten(1)), (*caches, length + 1)

    def _encoded(self, x: Tensor, positions: Tensor) -> list[Tensor]:  # [B, H, T, D]
        q, k, v = self._heads(x)
        if self.encoding is not None:
            q, k = (self.encoding.features(y, positions, side) for y, side in ((q, "q"), (k, "k")))
        return [y.transpose(1, 2) for y in (q, k, v)]


class BaselineAttention(_Projected):
    """An attention system of the literature between projections; it has no step.

    Args:
        dim: Width of the model.
        heads: H.
        core: q, k, v [B, T, H, D] and positions to o.
        remembers: It keeps keys and values of earlier segments, through which no gradient reaches
            what they were made of.
    """

    def __init__(self, dim: int, heads: int, core: nn.Module, remembers: bool = False) -> None:
        super().__init__(dim, heads)
        self.core, self.remembers = core, remembers

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """Return y, and no state."""
        memory = {"memory": self._heads(x.detach())[1:]} if self.remembers else {}
        o = self.core(*self._heads(x), positions, **memory)
        return self.out_proj(o.flatten(-2)), None
