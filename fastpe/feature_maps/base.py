"""Feature maps as modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import check_positive
from .._torch import observed
from ..encodings.sharded import put


class FeatureMap(nn.Module):
    """A feature map that is a module: it may change the number of features, or have parameters.

    The arguments are fixed at construction. Your own map overrides `feature_dim`, `forward` and
    `extra_repr`, which names its configuration; attention refuses a state made with another one.
    Products of its features should be >= 0 if attention normalises by their sum.
    """

    # H, if the map has parameters for each head
    num_heads: int | None = None
    # the module of fastpe/attention that attends with it
    route = "linear"
    # (seed, step) of a random map; a state must have the same
    noise_key: Tensor | None = None
    _joined: tuple = (None, None, None)

    def feature_dim(self, width: int) -> int:
        """Return R, the features of a vector of `width` components.

        Raises:
            ValueError: the map takes vectors of another width.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of encoded queries or keys.

        Args:
            x: Encoded vectors, [..., H, width], float32, or float64 for float64 inputs.
        Returns:
            [..., H, R].
        """
        raise NotImplementedError

    def maybe_resample_(self) -> None:
        """Count a training forward and redraw the noise if it is due; layers call this."""

    @property
    def per_head_state(self) -> bool:
        """Whether each head of queries needs a state of its own, also if heads share keys."""
        return self.num_heads is not None

    def check_normalize(self, normalize: bool | str) -> None:
        """Raise ValueError if attention with this map cannot be normalised in this way.

        Args:
            normalize: True, False or "abs".
        """

    @property
    def signature(self) -> str:
        """The configuration as text."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def state_noise(self, key: Tensor | None) -> Tensor | None:
        """Return a state's noise key: the encoding's key, then this map's."""
        mine = self.noise_key
        if mine is None or key is None:
            return key if mine is None else mine
        if observed():
            return torch.cat((key, mine))
        # return the same tensor until the noise changes: states are then compared by identity
        joined = self._joined
        if joined[0] is not key or joined[1] is not mine:
            with torch.inference_mode(False):
                self._joined = joined = key, mine, torch.cat((key, mine))
        return joined[2]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_joined"}


class DPFP(FeatureMap):
    """Deterministic parameter-free projection (Schlag et al. 2021, arXiv 2102.11174, eqs. 37-38).

    Feature 2 D (i - 1) + j is r_j r_{j+i}, r = relu([x, -x]), indices modulo 2 D, i = 1 .. nu.

    Args:
        nu: Number of rolled copies; R = 2 D nu.

    Raises:
        ValueError: nu is not a positive int, or is not less than 2 D.
    """

    def __init__(self, nu: int = 1) -> None:
        super().__init__()
        check_positive("nu", nu)
        self.nu = nu

    def feature_dim(self, width: int) -> int:
        """R = 2 D nu."""
        if self.nu >= 2 * width:
            raise ValueError(f"nu must be less than twice the width {width}, got {self.nu}")
        return 2 * width * self.nu

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, [..., H, 2 D nu]."""
        r = torch.cat((x, -x), -1).relu()
        return torch.cat([r * r.roll(-i, -1) for i in range(1, self.nu + 1)], -1)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"nu={self.nu}"


class Taylor2(FeatureMap):
    """Second-order Taylor features of exp (Arora et al. 2024, Based, arXiv 2402.18668).

    phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(D), at least 1/2. Only products x_i x_j
    with i <= j are features, weighted to give the same kernel: R = 1 + D + D (D + 1) / 2.
    """

    def feature_dim(self, width: int) -> int:
        """R = 1 + D + D (D + 1) / 2."""
        return 1 + width + width * (width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, [..., H, R]."""
        d = x.shape[-1]
        x = x * d**-0.25
        i, j = torch.triu_indices(d, d, device=x.device)
        # a pair i < j stands for two products, a square for one; the kernel has s^2 / 2
        weight = torch.ones_like(i, dtype=x.dtype).masked_fill(i == j, math.sqrt(0.5))
        return torch.cat((torch.ones_like(x[..., :1]), x, weight * x[..., i] * x[..., j]), -1)


class Hedgehog(FeatureMap):
    """Learned spiky features (Zhang et al. 2024, arXiv 2402.04347): softmax([y, -y]), y = W x + b.

    Each head has its own W, initially the identity, and b, initially 0, for queries and keys.

    Args:
        head_dim: Width of the map's input: D, or the encoding's feature_dim.
        num_heads: H.

    Raises:
        ValueError: an argument is not a positive int.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        check_positive("head_dim", head_dim)
        check_positive("num_heads", num_heads)
        self.head_dim, self.num_heads = head_dim, num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every W to the identity and every b to zero."""
        put(self.weight, torch.eye(self.head_dim, device="cpu").expand(self.num_heads, -1, -1))
        put(self.bias, torch.zeros(self.num_heads, self.head_dim, device="cpu"))

    def feature_dim(self, width: int) -> int:
        """R = 2 D."""
        if width != self.head_dim:
            raise ValueError(f"feature_map is for head_dim = {self.head_dim}, got width {width}")
        return 2 * width

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, [..., H, 2 D]; they sum to 1."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = torch.einsum("...hd,hed->...he", x, weight) + bias
        return torch.cat((y, -y), -1).softmax(-1)

    def extra_repr(self) -> str:
        """Return the configuration."""
        return f"{self.head_dim}, {self.num_heads}"


# modules that stand behind names
WIDE_MAPS: dict[str, type[FeatureMap]] = {"dpfp": DPFP, "taylor2": Taylor2}
