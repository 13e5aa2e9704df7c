"""What a positional encoding is to the attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_position_dtype, check_positive
from ..backends import reference
from ..backends.specs import Rotation, SineMap


class PositionalEncoding(nn.Module):
    """A linear map of queries and keys that depends on their positions.

    The arguments are fixed at construction; parameters and buffers may change at any time.

    A new encoding overrides `features` (works on every backend at once), or `make_maps`, which the
    fused kernels read; and `kernel`.

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H, or None where the encoding is the same for every head.
        num_levels: Components L of a position.

    Raises:
        ValueError: an argument is no positive int.
    """

    # whether positions other than integers are refused
    integer_positions = False
    # whether its features are all rows of its sines, as they are
    exact = False
    # the module of fastpe/attention that attends with it
    route = "linear"
    # random encodings have noise to redraw and a key that a state must match
    noise_key: Tensor | None = None
    _signature: str | None = None

    def __init__(self, head_dim: int, num_heads: int | None = None, num_levels: int = 1) -> None:
        super().__init__()
        for name, value in (
            ("head_dim", head_dim),
            ("num_heads", num_heads),
            ("num_levels", num_levels),
        ):
            if value is not None:
                check_positive(name, value)
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        # whether heads encode in ways of their own: they can then share keys, but no state
        self.per_head = num_heads is not None

    @property
    def feature_dim(self) -> int:
        """R, the number of features of a query or key."""
        raise NotImplementedError

    @property
    def norm_dim(self) -> int:
        """Number of features that the normaliser sees."""
        return self.feature_dim

    def state_widths(self, normalize: bool | str) -> tuple[int, int]:
        """Return R and Rz of a state, unless a feature map changes them.

        Args:
            normalize: As in `causal_linear_attention`; False leaves Rz = 0.
        """
        return self.feature_dim, self.norm_dim if normalize else 0

    def make_maps(
        self, device: torch.device | None = None
    ) -> tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | None:
        """Return the position maps of queries and of keys; None if `features` is overridden.

        Args:
            device: Of the queries and keys, for an encoding that has no tensor there; else unused.
        """
        return None

    def map_inputs(self) -> list[Tensor]:
        """Return the tensors that `make_maps` is made of, besides the noise."""
        return [*self.parameters(), *self.buffers()]

    def features(self, x: Tensor, positions: Tensor, side: str) -> Tensor:
        """Return the encoded queries or keys in plain PyTorch, before any feature map.

        Args:
            x: [B, T, H, D].
            positions: [B or 1, T, L], float64.
            side: "q" or "k".
        Returns:
            [B, T, H, R].
        """
        position_map = self.make_maps(x.device)["qk".index(side)]
        if isinstance(position_map, Rotation):
            return reference.rotate(x, positions, position_map)
        return reference.sine_features(x, positions, position_map)

    def kernel(self, positions_q: Tensor, positions_k: Tensor | None = None) -> Tensor:
        """Return C with E[features(q) . features(k)] = sqrt(R / D) q^T C k, in closed form.

        The factor sqrt(R / D) gives a feature map of temperature 1 / sqrt(R) the usual logits
        divided by sqrt(D); with scale="paper" it is 1.

        Args:
            positions_q: [...] for one level, else [..., L].
            positions_k: Likewise, broadcast against positions_q; default 0, so that a
                shift-invariant encoding takes lags alone.
        Returns:
            [..., H or 1, D, D], float64.
        """
        raise NotImplementedError

    def _levels(self, positions: Tensor | None) -> Tensor:  # [..., L]
        if positions is None:
            return torch.zeros(self.num_levels, dtype=torch.float64)
        positions = torch.as_tensor(positions)
        check_position_dtype("positions", positions)
        positions = positions.double()
        return positions[..., None] if self.num_levels == 1 else positions

    def maybe_resample_(self) -> None:
        """Redraw the noise where a training forward is due to; called by the layer."""

    def __getstate__(self) -> dict[str, object]:
        """Return what is copied and pickled: not what can be made again."""
        return {k: v for k, v in self.__dict__.items() if k != "_signature"}

    @property
    def signature(self) -> str:
        """The configuration as text: a state made with another one is refused."""
        if self._signature is None:
            self._signature = f"{type(self).__name__}({self.extra_repr()})"
        return self._signature
