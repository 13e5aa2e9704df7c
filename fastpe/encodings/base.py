"""The base class of positional encodings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_position_dtype, check_positive
from ..backends import reference
from ..backends.specs import Rotation, SineMap


class PositionalEncoding(nn.Module):
    """A linear map of queries and keys that depends on their positions.

    The arguments are fixed at construction; parameters and buffers may change at any time.

    Your own encoding overrides `kernel` and one of two methods: `features`, which works on every
    backend, or `make_maps`, which the fused kernels read.

    Args:
        head_dim: Size D of queries and keys.
        num_heads: H, or None if all heads are encoded alike.
        num_levels: Components L of a position.

    Raises:
        ValueError: an argument is not a positive int.
    """

    # True: positions must be integers
    integer_positions = False
    # True: every row of the sines is a feature, neither projected nor summed
    exact = False
    # the module of fastpe/attention that attends with it
    route = "linear"
    # (seed, step) of a random encoding; a state must have the same
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
        # True: each head encodes in its own way, so heads can share keys but no state
        self.per_head = num_heads is not None

    @property
    def feature_dim(self) -> int:
        """R, the features of a query or key."""
        raise NotImplementedError

    @property
    def norm_dim(self) -> int:
        """Rz, the features that the normaliser sees."""
        return self.feature_dim

    def state_widths(self, normalize: bool | str) -> tuple[int, int]:
        """Return R and Rz of a state, before a feature map; normalize=False gives Rz = 0."""
        return self.feature_dim, self.norm_dim if normalize else 0

    def make_maps(
        self, device: torch.device | None = None
    ) -> tuple[Rotation, Rotation] | tuple[SineMap, SineMap] | None:
        """Return the position maps of queries and keys, or None if you override `features`.

        Encodings that have no tensor on the device of queries and keys use `device`.
        """
        return None

    def map_inputs(self) -> list[Tensor]:
        """Return the tensors that `make_maps` reads, apart from the noise."""
        return [*self.parameters(), *self.buffers()]

    def features(self, x: Tensor, positions: Tensor, side: str) -> Tensor:
        """Return encoded queries or keys, before any feature map, in plain PyTorch.

        Args:
            x: Queries or keys, [B, T, H, D].
            positions: Their positions, [B or 1, T, L], float64.
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
        divided by sqrt(D). With scale="paper" it is 1.

        Args:
            positions_q: Positions of queries, [...] for one level, else [..., L].
            positions_k: Positions of keys, broadcast against positions_q; default 0, so you can
                give lags to a shift-invariant encoding.
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
        """Count a training forward and redraw the noise if it is due; layers call this."""

    def __getstate__(self) -> dict[str, object]:
        """Leave caches out of copies and pickles."""
        return {k: v for k, v in self.__dict__.items() if k != "_signature"}

    @property
    def signature(self) -> str:
        """The configuration as text; attention refuses a state made with another one."""
        if self._signature is None:
            self._signature = f"{type(self).__name__}({self.extra_repr()})"
        return self._signature
