"""Mixing of tokens by a Fourier transform. Not causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FNet(nn.Module):
    """Re F_seq F_hid v, Lee-Thorp et al. 2022 (arXiv 2105.03824, equation 3).

    The transforms run over the tokens and over all H D entries of a token: every output depends on
    every token, a row of bidirectional mixing. q and k are not used. It is torch.fft in one line,
    and so it is in transformers (FNetBasicFourierTransform), which wants a configuration for it.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o of v [B, T, H, D]; q, k and positions are not used."""
        # there are no transforms of half precision for every length and device
        x = v.flatten(2).to(torch.promote_types(v.dtype, torch.float32))
        return torch.fft.fft2(x, dim=(1, 2)).real.to(v.dtype).view(v.shape)
