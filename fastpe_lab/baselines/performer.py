"""Linear attention with positive random features."""

from __future__ import annotations

from torch import Tensor, nn

import fastpe

from .parts import check_positive


class Performer(nn.Module):
    """FAVOR+ without positions, Choromanski et al. 2021 (arXiv 2009.14794).

    E phi(q) . phi(k) = exp(q . k / sqrt(D)). This is `fastpe.Favor`. The published code subtracts
    the largest exponent over all keys, so its outputs depend on later keys. Each training forward
    draws new features.

    Args:
        num_features: R, even; 256 in the paper.
        seed: seed of the features; default drawn from torch's generator.
    """

    def __init__(self, *, num_features: int = 256, seed: int | None = None) -> None:
        super().__init__()
        check_positive(num_features=num_features)
        self.favor = fastpe.Favor(num_features, seed=seed)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        return fastpe.causal_linear_attention(q, k, v, feature_map=self.favor)
