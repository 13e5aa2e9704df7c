"""Softmax attention without positions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Softmax(nn.Module):
    """Causal softmax attention, Vaswani et al. 2017 (arXiv 1706.03762, equation 1).

    o_i = sum_(j <= i) softmax_j(q_i . k_j / sqrt(D)) v_j, by PyTorch's own function. `ape` adds
    positions to the input.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q, k, v, all [B, T, H, D]; positions are ignored."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
