"""Sequences of different lengths in one call: packed in one row, or rows with padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.register import refuse_transforms
from .call import Setting, Sums


class Packing(NamedTuple):
    """Which tokens belong to which sequence; with neither, each row of the batch is one.

    Attributes:
        cu_seqlens: [S + 1]; sequence i has the tokens [cu_seqlens[i], cu_seqlens[i + 1]) of a row.
        padding: [B, T], True at tokens that belong to no sequence.
    """

    cu_seqlens: Tensor | None = None
    padding: Tensor | None = None

    def lengths(self, tokens: int) -> int | Tensor:
        """Return the number of tokens of every sequence, or int64 [S]."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.padding is not None:
            return (~self.padding).sum(1)
        return tokens

    def part(self, tokens: slice) -> Packing:
        """Return the packing of a slice of each row."""
        return self if self.padding is None else Packing(padding=self.padding[:, tokens])

    def along(self, tokens: int, align: str | None) -> Packing:
        """Return the same of longer rows, whose tokens without a key are no padding."""
        if self.padding is None or self.padding.shape[1] == tokens:
            return self
        more = tokens - self.padding.shape[1]
        sides = (more, 0) if align == "end" else (0, more)
        return Packing(padding=torch.nn.functional.pad(self.padding, sides))

    def default_positions(self, start: int | Tensor, tokens: int, device: torch.device) -> Tensor:
        """Return 0, 1, 2, ... of each sequence's own tokens, from start on: [B or 1, T, 1]."""
        if self.padding is not None:
            count = ((~self.padding).cumsum(1) - 1).clamp(min=0)
            count = count + (start.unsqueeze(1) if isinstance(start, Tensor) else start)
        elif self.cu_seqlens is not None:
            count = torch.arange(tokens, device=device)
            sequence = torch.searchsorted(self.cu_seqlens[1:].long(), count, right=True)
            count = count - self.cu_seqlens.long()[sequence]
            count = (count + (start[sequence] if isinstance(start, Tensor) else start))[None]
        elif isinstance(start, Tensor):
            count = start[:, None] + torch.arange(tokens, device=device)
        elif tokens == 1:
            return torch.full((1, 1, 1), start, dtype=torch.float64, device=device)
        else:
            count = torch.arange(start, start + tokens, dtype=torch.float64, device=device)[None]
        return count.to(torch.float64).unsqueeze(-1)


# each row of a batch is a sequence
ROWS = Packing()


class _Reorder(torch.autograd.Function):
    """Rows of x in another order; the gradient in the order before."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


class Rows:
    """Rows with padding as one row of ranges: the tokens of each row, then its padding.

    Padding is moved, but no kernel computes with it.

    Args:
        padding: [B, T], True at padding, on any side.
    """

    def __init__(self, padding: Tensor) -> None:
        self.shape = b, t = padding.shape
        # without reading values, which would synchronise with a GPU and could not be compiled
        inside = padding.to(torch.int8).argsort(dim=1, stable=True)
        begin = torch.arange(b, device=padding.device) * t
        self.order = (inside + begin[:, None]).flatten()
        self.inverse = torch.zeros_like(self.order).scatter_(
            0, self.order, torch.arange(b * t, device=padding.device)
        )
        #: int64 [B, 2]
        self.ranges = torch.stack((begin, begin + (~padding).sum(1)), 1)

    def join(self, x: Tensor) -> Tensor:
        """Return [B, T, ...] as [1, B T, ...], each row's tokens first."""
        refuse_transforms()
        return _Reorder.apply(x.flatten(0, 1), self.order, self.inverse).unsqueeze(0)

    def split(self, x: Tensor) -> Tensor:
        """Return the opposite of `join`."""
        return _Reorder.apply(x.squeeze(0), self.inverse, self.order).unflatten(0, self.shape)


class Padded:
    """Packed sequences as rows with padding behind them.

    Args:
        cu_seqlens: [S + 1].
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        bounds = cu_seqlens.long()
        lengths = bounds.diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        place = torch.arange(longest, device=bounds.device)
        #: [S, longest], True behind the end
        self.padding = place >= lengths[:, None]

    def split(self, x: Tensor) -> Tensor:
        """Return [1, N, ...] as [S, longest, ...], zeros at padding."""
        rows = x.new_zeros(*self.padding.shape, *x.shape[2:])
        inside = ~self.padding.view(*self.padding.shape, *(1,) * (x.ndim - 2))
        return rows.masked_scatter(inside, x)

    def join(self, x: Tensor) -> Tensor:
        """Return [S, longest, ...] as [1, N, ...]."""
        return x[~self.padding].unsqueeze(0)


def one_by_one(
    attend: Callable[..., tuple[Tensor, Sums]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Sums]:
    """Return the result of `attend` for packed sequences, one at a time; it reads cu_seqlens."""
    lengths, none = cu_seqlens.diff().tolist(), itertools.repeat(None)
    parts = [x.split(lengths, 1) for x in (q, k, v)]
    at = none if positions is None else positions.split(lengths, 1)
    before = none
    if state is not None:
        rows = range(len(lengths))
        before = (Sums(*(None if x is None else x[i : i + 1] for x in state)) for i in rows)
    results = [attend(*each, setting, Packing()) for each in zip(*parts, at, before, strict=False)]
    if not results:  # no sequence has a state too, of no rows
        o, sums = attend(q, k, v, positions, None, setting, Packing())
        return o, Sums(*(None if x is None else x[:0] for x in sums))
    o, sums = zip(*results, strict=True)
    joined = (None if x[0] is None else torch.cat(x) for x in zip(*sums, strict=True))
    return torch.cat(o, 1), Sums(*joined)
