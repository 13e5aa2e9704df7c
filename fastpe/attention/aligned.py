"""Causal attention of queries and keys that differ in number."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Setting, Sums
from .packing import Packing


def attend_aligned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    state: Sums | None,
    setting: Setting,
    packing: Packing,
    align: str,
) -> tuple[Tensor, Sums]:
    """Return the result of a route's `attend` if q and k differ in length.

    It scans the tokens that q and k share. It adds further keys to the state, before or behind
    these, and further queries read the state there.

    Args:
        positions: Positions of the longer one.
        align: "end" or "start": where the tokens that both have stand in the longer one.
    """
    route, heads = setting.route, q.shape[2]
    longest, more = max(k.shape[1], q.shape[1]), abs(k.shape[1] - q.shape[1])
    alone, both = slice(0, more), slice(more, None)
    if align == "start":
        alone, both = slice(longest - more, None), slice(0, longest - more)
    at = [None if positions is None else positions[:, part] for part in (alone, both)]
    shared = *(x if x.shape[1] != longest else x[:, both] for x in (q, k, v)), at[1]
    longer_keys, padding = k.shape[1] == longest, packing.padding

    def absorbed(state: Sums | None) -> Sums:
        there = None if padding is None else padding[:, alone]
        return route.absorb(k[:, alone], v[:, alone], at[0], state, setting, there, heads)

    def read(state: Sums | None) -> Tensor:
        if state is None:  # there is nothing to see
            return v.new_zeros(q.shape[0], more, heads, v.shape[-1])
        return route.readout(q[:, alone], at[0], state, setting).to(v.dtype)

    tokens = packing.part(both) if longer_keys else packing
    if align == "end":
        before = absorbed(state) if longer_keys else state
        o, after = route.attend(*shared, before, setting, tokens)
        return (o if longer_keys else torch.cat((read(state), o), 1)), after
    o, after = route.attend(*shared, state, setting, tokens)
    if longer_keys:
        return o, absorbed(after)
    return torch.cat((o, read(after)), 1), after
