"""Segments with a memory, and with a coarser memory of what came before that."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import attend, causal, check_positive, in_blocks, previous
from .transformer_xl import RelativeLogits

KINDS = ("mean", "max", "conv")


class Compressive(nn.Module):
    """Compressive Transformer, Rae et al. 2020 (arXiv 1911.05507).

    A segment attends to itself up to the token, to the segment before (the memory), and to the last
    `compressed` slots of what is older, each of which is `rate` tokens made one: their mean, their
    maximum, or a convolution with that stride. Logits are Transformer-XL's with distances counted
    in slots. No gradient goes into the memories, and none of the output into the convolution: this
    learns from the attention-reconstruction loss (algorithm 2), the mean square of att(q, old) -
    att(q, compressed), where each segment's queries look at the memory that it forgets, without
    positions. After a forward with gradients it is `auxiliary_loss`, else that is None; its
    gradients go into the convolution alone.

    Keys and values are compressed here, each head by itself, where the paper compresses hidden
    states and projects them: for the mean the two are the same.

    Args:
        head_dim: D.
        num_heads: H.
        kind: "mean", "max" or "conv".
        memory: Tokens of the memory and of a segment, a multiple of rate.
        compressed: Slots of the compressed memory.
        rate: Tokens of a slot.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kind: str = "mean",
        *,
        memory: int = 64,
        compressed: int = 256,
        rate: int = 4,
    ) -> None:
        super().__init__()
        check_positive(memory=memory, compressed=compressed, rate=rate)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if memory % rate:
            raise ValueError(f"memory must be a multiple of rate = {rate}, got {memory}")
        self.kind, self.memory, self.compressed, self.rate = kind, memory, compressed, rate
        self.logits = RelativeLogits(head_dim, num_heads)
        # of keys, then of values
        shape = (2, num_heads, rate, head_dim, head_dim)
        filters = nn.Parameter(torch.randn(shape) * (rate * head_dim) ** -0.5)
        self.register_parameter("filters", filters if kind == "conv" else None)
        self.auxiliary_loss: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return o, [B, T, H, D]; set auxiliary_loss.

        Args:
            q: [B, T, H, D], like k and v.
            positions: Not used.
            memory: What the memories are made of instead of k and v without gradients: keys and
                values of all tokens made from inputs without gradients, so that projections learn.
        """
        t = q.shape[1]
        old = (k.detach(), v.detach()) if memory is None else memory
        q, k, v, *old = (in_blocks(x, self.memory) for x in (q, k, v, *old))  # [B, N, S, H, D]
        self.auxiliary_loss = None
        if torch.is_grad_enabled():
            self.auxiliary_loss = self._reconstruction(q.detach(), [x.detach() for x in old], t)
        filters = None if self.filters is None else self.filters.detach()
        coarse = (self._window(x) for x in self._compress(old, filters))
        k, v = (
            torch.cat((c, previous(m), x), 2) for c, m, x in zip(coarse, old, (k, v), strict=True)
        )
        return attend(self.logits(q, k), v, self._visible(q)).flatten(1, 2)[:, :t]

    def _compress(self, old: list[Tensor], filters: Tensor | None) -> list[Tensor]:
        """Return keys and values, [B, N, S, H, D], with `rate` of them made one."""
        old = [x.unflatten(2, (-1, self.rate)) for x in old]
        if self.kind == "mean":
            return [x.mean(3) for x in old]
        if self.kind == "max":
            return [x.amax(3) for x in old]
        return [
            torch.einsum("bnsrhd,hrde->bnshe", x, w.to(x.dtype))
            for x, w in zip(old, filters, strict=True)
        ]

    def _window(self, slots: Tensor) -> Tensor:
        """Return the compressed memory of each segment, [B, N, compressed, H, D]: the last slots.

        Args:
            slots: Of each segment, [B, N, S / rate, H, D]; those of the memory are not in it.
        """
        count, per_segment = slots.shape[1:3]
        slots = slots.flatten(1, 2)
        slots = F.pad(slots, (0, 0, 0, 0, self.compressed + per_segment, 0))
        return slots.unfold(1, self.compressed, per_segment)[:, :count].movedim(-1, 2)

    def _visible(self, q: Tensor) -> Tensor:
        """Return which keys each query sees, [N, 1, S, compressed + 2 S]."""
        count, size = q.shape[1:3]
        segment = torch.arange(count, device=q.device)[:, None]
        slot = torch.arange(self.compressed, device=q.device)
        made = slot + (segment - 1) * (size // self.rate) >= self.compressed
        past = torch.cat((made, (segment >= 1).expand(-1, size)), 1)
        past = past[:, None, None].expand(-1, 1, size, -1)
        here = causal(size, q.device).expand(count, 1, -1, -1)
        return torch.cat((past, here), -1)

    def _reconstruction(self, q: Tensor, old: list[Tensor], length: int) -> Tensor:
        """Return the loss of the segments after the first; 0 if there is none."""
        rest = length - self.memory
        if rest <= 0:
            return q.new_zeros(())
        q, old = q[:, 1:] * q.shape[-1] ** -0.5, [x[:, :-1] for x in old]
        seen = [
            attend(torch.einsum("bnthd,bnshd->bnhts", q, k), v)
            for k, v in (old, self._compress(old, self.filters))
        ]
        # the last segment may end early
        return (seen[0] - seen[1]).flatten(1, 2)[:, :rest].square().mean()

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"kind={self.kind!r}, memory={self.memory}, compressed={self.compressed}, "
            f"rate={self.rate}"
        )
