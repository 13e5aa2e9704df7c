"""Attention within buckets of similar tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import check_positive, in_blocks, previous

# the paper subtracts this from the logit of a token with itself
SELF = 1e5


class Reformer(nn.Module):
    """LSH attention, Kitaev et al. 2020 (arXiv 2001.04451, section 2 and appendix A), causal.

    Queries are the keys: logits are q_i . q_j / |q_j|, and k is ignored. (The published code gives
    keys a root mean square of 1 and divides by sqrt(D), which is the same.) In each round a token's
    bucket is argmax [q R; -q R] with a random R, and the token sees the last `chunk` tokens before
    it in its bucket. o is softmax attention to all tokens that are seen in some round. A token sees
    itself only if it sees no other.

    The published chunks (transformers' LSHSelfAttention) are cut from the sorted sequence, so later
    tokens move the cuts and change earlier outputs. We count within a bucket, which avoids this.

    Args:
        head_dim: D.
        num_heads: H; each head has its own hashes.
        num_buckets: number of buckets, even. The paper has two for each chunk of the sequence. Here
            the number is fixed, so that a token sees the same tokens for every T.
        chunk: number of tokens that a token sees in a bucket; 64 in the paper.
        num_hashes: number of rounds; the paper trains with 1 to 8.
        seed: seed of R.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_buckets: int = 64,
        chunk: int = 64,
        num_hashes: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, num_heads=num_heads, chunk=chunk, num_hashes=num_hashes)
        check_positive(num_buckets=num_buckets)
        if num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {num_buckets}")
        self.chunk = chunk
        shape = (num_hashes, num_heads, head_dim, num_buckets // 2)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rotations", torch.randn(shape, generator=generator))

    def buckets(self, q: Tensor) -> Tensor:
        """Return each token's bucket in each round, [B, rounds, H, T]."""
        # always in float32, because rounding can move a token to another bucket
        turned = torch.einsum("bthd,rhdn->brhtn", q.float(), self.rotations.float())
        return torch.cat((turned, -turned), -1).argmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return o from q and v, [B, T, H, D]; k and positions are ignored."""
        length = q.shape[1]
        with torch.no_grad():
            bucket = self.buckets(q)
            order = bucket.argsort(dim=-1, stable=True)
            place = order.argsort(-1)  # place in the sorted sequence, [B, rounds, H, T]
            # i sees j if 0 <= code_i - code_j <= chunk, which is false across buckets
            code = (bucket + 1) * (length + self.chunk + 1) + place
        # SELF needs the range of float32
        wide = torch.promote_types(q.dtype, torch.float32)
        x, y = (
            self._sorted(z.transpose(1, 2)[:, None].expand(-1, code.shape[1], -1, -1, -1), order)
            for z in (q.to(wide), v.to(wide))
        )
        keys = _with_previous(F.normalize(x, dim=-1))
        logits = torch.einsum("gntd,gnsd->gnts", x, keys) + self._bias(code, order, wide)
        o = torch.einsum("gnts,gnse->gnte", logits.softmax(-1), _with_previous(y))
        z = logits.logsumexp(-1, keepdim=True)
        o, z = (self._unsorted(r, place) for r in (o, z))  # [B, rounds, H, T, .]
        return (z.softmax(1) * o).sum(1).transpose(1, 2).to(v.dtype)

    def _bias(self, code: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias for the logits of sorted blocks, [B rounds H, N, chunk, 2 chunk].

        It is -log(number of rounds in which a pair is seen), -SELF for a token with itself, and
        -inf for unseen pairs. So all rounds together form one softmax.
        """
        with torch.no_grad():
            own, _ = self._lag(code, order)
            seen = torch.zeros_like(own, dtype=dtype)
            for other in range(code.shape[1]):
                seen += self._lag(code[:, other : other + 1].expand_as(code), order)[1]
            bias = -seen.clamp(min=1).log() - SELF * (own == 0)
            return bias.masked_fill((own < 0) | (own > self.chunk), -torch.inf)

    def _lag(self, code: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return the differences of codes for pairs in sorted blocks, and which pairs are seen."""
        x = self._sorted(code[..., None], order)
        lag = x - _with_previous(x).transpose(-1, -2)
        return lag, (lag >= 0) & (lag <= self.chunk)

    def _sorted(self, x: Tensor, order: Tensor) -> Tensor:
        """Return x [B, rounds, H, T, E] sorted, in blocks [B rounds H, N, chunk, E]."""
        x = x.gather(3, order[..., None].expand(x.shape))
        return in_blocks(x.flatten(0, 2), self.chunk)

    def _unsorted(self, x: Tensor, place: Tensor) -> Tensor:
        """Return blocks as tokens in their first order, [B, rounds, H, T, E]."""
        x = x.flatten(1, 2)[:, : place.shape[-1]].unflatten(0, place.shape[:3])
        return x.gather(3, place[..., None].expand(x.shape))

    def extra_repr(self) -> str:
        """Return the configuration."""
        hashes, _, _, half = self.rotations.shape
        return f"num_buckets={2 * half}, chunk={self.chunk}, num_hashes={hashes}"


def _with_previous(blocks: Tensor) -> Tensor:
    return torch.cat((previous(blocks), blocks), 2)
