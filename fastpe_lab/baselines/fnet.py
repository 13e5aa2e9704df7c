"""A Fourier transform mixes the tokens. Not causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FNet(nn.Module):
    """Re F_seq F_hid v, Lee-Thorp et al. 2022 (arXiv 2105.03824, equation 3).

    The transforms run over the tokens and over the H D entries of a token. Every output depends on
    every token: the mixing is bidirectional. q and k are ignored. This is one line of torch.fft;
    transformers' FNetBasicFourierTransform has the same line and needs a configuration.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from v [B, T, H, D]; q, k and positions are ignored."""
        # not every length and device has a transform in half precision
        x = v.flatten(2).to(torch.promote_types(v.dtype, torch.float32))
        return torch.fft.fft2(x, dim=(1, 2)).real.to(v.dtype).view(v.shape)
