"""The layers around the attention: projections of any class, padding, and wrappers."""

import copy
import warnings

import pytest
import torch
from conftest import encodings
from helpers import assert_within
from torch import nn

from fastpe import RoPE
from fastpe.nn import CausalLinearAttention, LinearAttention

LAYERS = pytest.mark.parametrize("kind", [CausalLinearAttention, LinearAttention])


class Adapter(nn.Module):
    """A frozen projection and a trained part of low rank; its weight alone is the frozen one's."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """A projection by integers, which has no weight of its input's dtype, or none at all."""

    def __init__(self, base):
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 127
        self.register_buffer("weight", (base.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


def _swapped(kind, swap, **options):
    torch.manual_seed(0)
    layer = kind(12, 3, **options)
    layer.in_proj, layer.out_proj = swap(layer.in_proj), swap(layer.out_proj)
    return layer


@LAYERS
def test_adapters_take_part(kind):
    layer, x = _swapped(kind, Adapter), torch.randn(2, 7, 12)
    calls = {"itself": lambda: layer(x)}
    if kind is LinearAttention:
        calls["context"] = lambda: layer(x, x)
    found = {}
    for name, call in calls.items():
        layer.zero_grad()
        y = call()
        y.square().sum().backward()
        parts = [layer.in_proj.up.weight.grad, layer.out_proj.up.weight.grad]
        assert all(g is not None and g.abs().max() > 0 for g in parts), name
        found[name] = y, *parts
    for other in found.values():
        for actual, wanted in zip(other, found["itself"], strict=True):
            assert_within(actual, wanted, 1e-5)


def test_hooks_of_projections_run_with_a_context():
    layer, seen = LinearAttention(12, 3), []
    layer.in_proj.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 12)
    layer(x, context)
    assert [tuple(y.shape) for y in seen] == [(2, 7, 12), (2, 5, 12)]


@LAYERS
def test_projections_of_another_class(kind):
    layer, x = _swapped(kind, Quantised), torch.randn(2, 7, 12)
    assert layer(x).isfinite().all()
    if kind is LinearAttention:
        assert_within(layer(x, x), layer(x), 1e-6)
    else:
        _, state = layer(x, output_final_state=True)
        assert layer.step(x[:, 0], state)[0].isfinite().all()


# padding


@LAYERS
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe", "custom"))
def test_padding_reaches_no_gradient(backend, kind, make):
    """NaN at padding, in tokens and in the gradient of outputs: every gradient is as without it."""
    torch.manual_seed(0)
    layer = kind(12, 3, pos_encoding=make(4, 3), backend=backend).double().eval()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, :2], padding[0, -1] = True, True
    weight = torch.randn(2, 6, 12, dtype=torch.float64)
    names = ["x", *(name for name, _ in layer.named_parameters())]

    def run(fill):
        given = x.masked_fill(padding[..., None], fill).requires_grad_()
        y = layer(given, key_padding_mask=padding)
        loss_weight = weight.masked_fill(padding[..., None], fill)
        return y, *torch.autograd.grad(y, [given, *layer.parameters()], loss_weight)

    y, *grads = run(torch.nan)
    assert torch.equal(y[padding], torch.zeros_like(y[padding]))
    wanted_y, *wanted = run(0.0)
    assert torch.equal(y, wanted_y)
    for name, actual, expected in zip(names, grads, wanted, strict=True):
        assert torch.equal(actual, expected), name


def test_padding_of_a_context():
    torch.manual_seed(0)
    layer = LinearAttention(12, 3)
    x, context = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    masks = {"query_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}
    masks["key_padding_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    masks["query_padding_mask"][0, 3:], masks["key_padding_mask"][1, 0] = True, True
    found = []
    for fill in (torch.nan, 0.0):
        q, kv = (
            y.masked_fill(mask[..., None], fill)
            for y, mask in zip((x, context), masks.values(), strict=True)
        )
        y = layer(q, kv, **masks)
        found.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    assert all(map(torch.equal, *found))
    with pytest.raises(ValueError, match=r"query_padding_mask must be \[B, T\] = \(2, 6\)"):
        layer(x, context, query_padding_mask=masks["key_padding_mask"])
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        layer(x, context, key_padding_mask=torch.zeros(2, 5))


# positions


def _mixed_precision(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # that nn.Linear returns a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = CausalLinearAttention(16, 2, pos_encoding=RoPE(8))

        def forward(self, x, positions):
            return self.attention(x, positions=positions)

    block, seconds = Block().eval(), torch.arange(1000, 1008).float()
    layer, x = copy.deepcopy(block.attention), torch.randn(1, 8, 16)
    whole = block(x, seconds)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (layer, block):
        fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"), mp_policy=policy)
    # the layer's own wrapper does not reach its positions
    assert_within(layer(x, positions=seconds).float(), whole, 2e-2)
    # another module's does, and floats are refused then
    try:
        block(x, seconds)
    except TypeError as error:
        assert "cast_forward_inputs=False" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("rounded positions were taken")
    assert_within(block(x, seconds.long()).float(), whole, 2e-2)


def test_mixed_precision_does_not_round_positions(ranks):
    ranks(1, _mixed_precision)
