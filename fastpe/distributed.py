"""One sequence over many devices: causal linear attention on `torch.distributed` groups.

Each rank holds a slice of the sequence, in the order of ranks. A slice needs only the state after
the slices before it, so ranks exchange states, whose size does not depend on T:

    dist.init_process_group(...)
    layer = fastpe.nn.CausalLinearAttention(512, 8, pos_encoding=fastpe.SineSPE(64, 8))
    for x in (*layer.parameters(), *layer.buffers()):  # buffers: every rank needs the same noise
        dist.broadcast(x.detach(), src=0)
    y = layer(x[:, begin:end], group=dist.group.WORLD)
    loss(y).backward()
    for p in layer.parameters():
        dist.all_reduce(p.grad)
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from . import attention, backends
from .attention.api import choose
from .attention.call import config, noise_in_use, per_head
from .attention.packing import ROWS
from .attention.state import LinearAttentionState, check_state
from .attention.validation import (
    check_encoding,
    check_feature_map,
    check_options,
    check_positions,
    take_inputs,
)
from .backends.specs import SineMap
from .encodings.base import PositionalEncoding
from .feature_maps.base import FeatureMap
from .ops.sine_features import sine_features


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    pos_encoding: PositionalEncoding | None = None,
    positions: Tensor | None = None,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool | str = True,
    eps: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Return this rank's slice of `fastpe.causal_linear_attention` over a sequence.

    Each rank computes the state of its own tokens, gathers the states of all ranks, and attends
    from the sum of those before it. So it scans twice, but computes the features of SPE and
    F-StrIPE once.

    Each rank sends its state to every other rank, B H (R E + Rz) numbers (plus c with `Favor`), and
    as many in the backward. Before that it sends twelve integers; the host waits for these, and
    torch.compile breaks its graph there.

    Call this on all ranks, then call backward on all ranks. Slices may differ in length only, which
    may be 0. Gradients are those of the sum of all ranks' losses. initial_state and the parameters
    of pos_encoding and feature_map are the same on every rank, and each rank gets a part of their
    gradient: sum it over the group.

    Arguments are those of `fastpe.causal_linear_attention`. For slices they mean:

    Args:
        q: Queries of this rank's slice, [B, T_rank, H, D].
        k: Keys, [B, T_rank, Hk, D].
        v: Values, [B, T_rank, Hk, E].
        group: Ranks in the order of their slices, default all; its backend must serve q's device.
        pos_encoding: An encoding with features, so not ConvSPE without noise.
        positions: Positions of this slice; by default they continue over the ranks.
        initial_state: State before the whole sequence, the same on every rank.
        output_final_state: True also returns the state after the whole sequence, on every rank.
    Returns:
        o: [B, T_rank, H, E] in v's dtype; with output_final_state a pair of o and the state.
    Raises:
        ValueError: an argument is not as above, or ranks differ in shapes, dtypes, options,
            whether gradients are needed, or the noise of pos_encoding (broadcast its buffers).
            These differences raise on every rank. An argument that one rank alone refuses leaves
            the others waiting.
    """
    q, k, v, _ = take_inputs(q, k, v)
    feature_map = check_options(feature_map, normalize, eps, chunk_size)
    check_encoding(pos_encoding, q)
    check_feature_map(feature_map, pos_encoding, q)
    route = choose(pos_encoding, feature_map)
    if pos_encoding is not None and pos_encoding.route == "banded":
        raise ValueError("pos_encoding must have features, got ConvSPE without noise")
    made_with = config(pos_encoding, feature_map, normalize)
    noise = noise_in_use(pos_encoding, feature_map)
    learned = [] if pos_encoding is None else pos_encoding.map_inputs()
    if isinstance(feature_map, FeatureMap):
        learned = [*learned, *feature_map.parameters()]
    if initial_state is not None:
        sizes = q.shape[0], q.shape[2] if per_head(pos_encoding, feature_map) else k.shape[2]
        features = pos_encoding, feature_map, normalize
        check_state(initial_state, q, v, sizes, features, made_with, noise)
    dtype, widths = route.kernel_sizes(q, v, pos_encoding, feature_map)
    backend = backends.resolve(backend, q.device, dtype, widths)
    start = 0 if initial_state is None else initial_state.length
    has_gradient = torch.is_grad_enabled() and any(map(_learns, (k, v, positions, *learned)))
    given = made_with, eps, q.dtype, initial_state is None, output_final_state
    # hash() of text differs between processes
    text = int.from_bytes(repr(given).encode(), "big") % (2**61 - 1)
    # noise keys of the encoding and of the feature map
    key = torch.zeros(4, dtype=torch.int64, device=q.device)
    if noise is not None:
        key[: len(noise)] = noise
    same = {
        "B, H, D, Hk and E": [q.shape[0], *q.shape[2:], *v.shape[2:]],
        "dtypes and options": [text],
        "whether keys, values, positions or parameters require grad": [has_gradient],
        "the noise of pos_encoding and feature_map, seed and step": key,
    }
    lengths = _agree(q.shape[1], same, q.device, group)
    rank = dist.get_rank(group)
    here, t = start + sum(lengths[:rank]), q.shape[1]
    positions = check_positions(positions, pos_encoding, q, t, here, ROWS)
    if isinstance(feature_map, str) and q.shape == k.shape:
        q, k, pos_encoding, positions = _encode(q, k, pos_encoding, positions, backend)
    attend = functools.partial(
        attention.causal_linear_attention,
        pos_encoding=pos_encoding,
        positions=positions,
        feature_map=feature_map,
        normalize=normalize,
        eps=eps,
        output_final_state=True,
        chunk_size=chunk_size,
        backend=backend,
    )
    # the state does not depend on the queries, but this call needs some
    own = attend(q.detach(), k, v)[1]
    before, after = _exchange(own, initial_state, group)
    o = attend(q, k, v, initial_state=before)[0]
    if not output_final_state:
        return o
    return o, after._replace(length=start + sum(lengths), config=made_with, noise=noise)


def _learns(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _encode(
    q: Tensor,
    k: Tensor,
    encoding: PositionalEncoding | None,
    positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, PositionalEncoding | None, Tensor | None]:
    """Return arguments for both scans, with q and k encoded if that costs more than a scan."""
    maps = None if encoding is None else encoding.make_maps(q.device)
    if maps is None or not isinstance(maps[0], SineMap):
        return q, k, encoding, positions
    q, k = (
        sine_features(x, positions, side, backend=backend)
        for x, side in zip((q, k), maps, strict=True)
    )
    return q, k, None, None


def _agree(
    length: int,
    same: dict[str, list[int] | Tensor],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """Return the lengths of all slices; raise ValueError unless all ranks have the `same`."""
    numbers = [torch.as_tensor(x, device=device).long() for x in ([length], *same.values())]
    rows = torch.stack(_gather(torch.cat(numbers), group)).split([len(x) for x in numbers], dim=1)
    lengths, *rows = (x.tolist() for x in rows)
    for name, came in zip(same, rows, strict=True):
        if came != came[:1] * len(came):
            raise ValueError(f"{name} must be the same on every rank, got {came}")
    return [length for (length,) in lengths]


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group)
    return parts


class _AllGather(torch.autograd.Function):
    """The numbers [P, N] of all P ranks, from [N] on each."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return torch.stack(_gather(x, group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Return the gradient of this rank's numbers, summed over ranks."""
        grads = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(grads, grad.contiguous(), group=ctx.group)
        return grads.sum(0), None


def _exchange(
    own: LinearAttentionState, initial: LinearAttentionState | None, group: dist.ProcessGroup | None
) -> tuple[LinearAttentionState, LinearAttentionState]:
    """Return the states before this rank's slice and after all slices."""
    names = [name for name in ("s", "z", "c") if getattr(own, name) is not None]
    mine = [getattr(own, name) for name in names]
    parts = _AllGather.apply(torch.cat([x.flatten() for x in mine]), group)
    parts = parts.split([x.numel() for x in mine], dim=1)
    states = {}
    for name, x, part in zip(names, mine, parts, strict=True):
        if initial is not None:
            first = getattr(initial, name)
        else:
            first = torch.full_like(x, torch.finfo(x.dtype).min if name == "c" else 0)
        states[name] = torch.cat((first[None], part.unflatten(1, x.shape)))
    before = {name: x[: dist.get_rank(group) + 1] for name, x in states.items()}
    return own._replace(**_merge(**before)), own._replace(**_merge(**states))


def _merge(s: Tensor, z: Tensor, c: Tensor | None = None) -> dict[str, Tensor]:
    """Return the state after P slices with s [P, B, H, R, E] and z [P, B, H, Rz].

    With FAVOR+'s c, [P, B, H, R], the sums of a slice are s exp(c) and z exp(c).
    """
    if c is None:
        return {"s": s.sum(0), "z": z.sum(0)}
    # c cancels in outputs, so it is constant to autograd; an empty slice has -inf
    c = c.detach().clamp(min=torch.finfo(c.dtype).min)
    top = c.amax(0)
    scale = (c - top).exp()
    return {"s": (s * scale[..., None]).sum(0), "z": (z * scale).sum(0), "c": top}
