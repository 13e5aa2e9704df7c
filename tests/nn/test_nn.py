"""The layer: what it computes, its state, its step, its place in a model."""

import copy
import io

import pytest
import torch
from conftest import encodings
from helpers import assert_within, make_inputs, make_positions

from fastpe import RoPE, SineSPE, causal_linear_attention, linear_attention
from fastpe.nn import CausalLinearAttention, LinearAttention


def _layer(make=None, backend="reference", dtype=torch.float64, **options):
    torch.manual_seed(3)
    encoding = None if make is None else make(4, 3)
    layer = CausalLinearAttention(12, 3, pos_encoding=encoding, backend=backend, **options)
    return layer.to(dtype).eval()


def _input(t=9, dtype=torch.float64):
    return make_inputs(2, t, 1, 12, 1, dtype)[0][:, :, 0]


@pytest.mark.parametrize(
    "options", [{}, {"value_dim": 18}, {"bias": False}, {"normalize": False}], ids=str
)
def test_layer_is_projections_around_attention(backend, make_encoding, options):
    layer = _layer(make_encoding, backend, **options)
    x = _input()
    positions = make_positions(layer.pos_encoding, 2, 9)
    weight, bias = layer.in_proj.weight, layer.in_proj.bias
    value_dim = options.get("value_dim", 12)
    assert weight.shape == (24 + value_dim, 12)
    assert (bias is None) == ("bias" in options)
    projected = x @ weight.T + (0 if bias is None else bias)
    q, k, v = projected.split((12, 12, value_dim), -1)
    o = causal_linear_attention(
        q.view(2, 9, 3, 4),
        k.view(2, 9, 3, 4),
        v.view(2, 9, 3, value_dim // 3),
        pos_encoding=layer.pos_encoding,
        positions=positions,
        normalize=options.get("normalize", True),
        backend="reference",
    )
    wanted = layer.out_proj(o.reshape(2, 9, value_dim))
    assert_within(layer(x, positions=positions), wanted, 1e-11)


def test_resume_and_step(backend, make_encoding):
    layer = _layer(make_encoding, backend)
    x = _input()
    positions = make_positions(layer.pos_encoding, 2, 9)

    def at(piece):
        return None if positions is None else positions[:, piece]

    whole, end = layer(x, positions=positions, output_final_state=True)
    y, state = layer(x[:, :5], positions=at(slice(0, 5)), output_final_state=True)
    parts = [y]
    y, state = layer(
        x[:, 5:7], positions=at(slice(5, 7)), initial_state=state, output_final_state=True
    )
    parts.append(y)
    for t in (7, 8):
        position = at(t)
        if position is not None and layer.pos_encoding.num_levels == 1:
            position = position[:, 0]
        y, state = layer.step(x[:, t], state, positions=position)
        parts.append(y[:, None])
    assert_within(torch.cat(parts, 1), whole, 1e-11)
    assert_within(state.s, end.s, 1e-11)
    assert_within(state.z, end.z, 1e-11)
    assert state.length == end.length == 9


def test_every_parameter_learns(backend, make_encoding):
    layer = _layer(make_encoding, backend, torch.float32).train()
    x = _input(dtype=torch.float32).requires_grad_()
    layer(x, positions=make_positions(layer.pos_encoding, 2, 9)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0


def test_place_in_a_model(make_encoding):
    """State dicts, deep copies and pickles give the same layer."""
    layer = _layer(make_encoding)
    x, positions = _input(), make_positions(layer.pos_encoding, 2, 9)
    wanted = layer(x, positions=positions)
    twin = _layer(make_encoding)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x, positions=positions), wanted)
    assert torch.equal(copy.deepcopy(layer)(x, positions=positions), wanted)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, positions=positions), wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x, positions=positions), wanted)


def test_replaces_multihead_attention():
    """Same call as nn.MultiheadAttention for what they share: batch first, [B, T, embed_dim]."""
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    ours = CausalLinearAttention(theirs.embed_dim, theirs.num_heads, backend="reference")
    assert ours.in_proj.weight.shape == theirs.in_proj_weight.shape
    assert ours.out_proj.weight.shape == theirs.out_proj.weight.shape
    x = torch.randn(2, 5, 12)
    assert ours(x).shape == theirs(x, x, x)[0].shape


def test_dtypes_and_devices_of_parameters():
    layer = CausalLinearAttention(12, 3, dtype=torch.float64, device="meta")
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_module(backend, make_encoding, dtype):
    """module.bfloat16() runs forward and backward, with states in float32."""
    layer = _layer(make_encoding, backend, dtype).train()
    positions = make_positions(layer.pos_encoding, 2, 9)
    y, state = layer(_input(dtype=dtype), positions=positions, output_final_state=True)
    assert y.dtype == dtype
    assert state.s.dtype == state.z.dtype == torch.float32
    y.float().square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == dtype
        assert p.grad.isfinite().all(), name
    wide = copy.deepcopy(layer).double()
    wide.backend = "reference"
    wide.eval()
    if getattr(layer.pos_encoding, "noise_key", None) is not None:
        layer.eval()
        y = layer(_input(dtype=dtype), positions=positions)
    assert_within(y, wide(_input(dtype=dtype).double(), positions=positions), 3e-2)


def test_representation():
    layer = CausalLinearAttention(12, 3, pos_encoding=SineSPE(4, 3), backend="reference")
    text = repr(layer)
    for part in ("12, 3", "feature_map='elu1'", "normalize=True", "SineSPE", "num_sines=10"):
        assert part in text
    assert "base=10000.0" in repr(RoPE(4))


def test_shared_heads_padding_and_packing(backend, make_encoding):
    layer = _layer(make_encoding, backend, num_kv_heads=1)
    assert layer.in_proj.weight.shape == (12 + 4 + 4, 12)
    x, mask = _input(), torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 5:] = True
    positions = make_positions(layer.pos_encoding, 2, 9)
    y = layer(x, positions=positions, key_padding_mask=mask)
    short = None if positions is None else positions[1:, :5]
    assert_within(y[1:, :5], layer(x[1:, :5], positions=short), 1e-11)
    packed = torch.cat((x[0], x[1, :5]))[None]
    if positions is not None:
        positions = torch.cat((positions[0], positions[1, :5]))[None]
    z = layer(packed, positions=positions, cu_seqlens=torch.tensor([0, 9, 14]))
    assert_within(z[0, :9], y[0], 1e-11)
    assert_within(z[0, 9:], y[1, :5], 1e-11)


@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_attention_both_ways(backend, make):
    torch.manual_seed(3)
    encoding = make(4, 3)
    layer = LinearAttention(12, 3, num_kv_heads=3, pos_encoding=encoding, backend=backend)
    layer.double().eval()
    x, context = _input(), _input(13)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0, :4] = True
    q, k, v = (
        (y @ w.T + b).view(2, -1, 3, 4)
        for y, w, b in zip(
            (x, context, context),
            layer.in_proj.weight.chunk(3),
            layer.in_proj.bias.chunk(3),
            strict=True,
        )
    )
    o = linear_attention(q, k, v, pos_encoding=encoding, key_padding_mask=mask, backend="reference")
    y = layer(x, context, key_padding_mask=mask)
    assert_within(y, layer.out_proj(o.flatten(-2)), 1e-11)
    # of the sequence to itself, padding is padding of both
    alone = layer(x[:1, 3:])
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, :3] = True
    assert_within(layer(x, key_padding_mask=mask)[:1, 3:], alone, 1e-11)
    packed = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 9, 18]))
    assert_within(packed.view(2, 9, 12), layer(x), 1e-11)
    with pytest.raises(ValueError, match="key_padding_mask must be given once without context"):
        layer(x, key_padding_mask=mask, query_padding_mask=~mask)
    with pytest.raises(ValueError, match="context must have x's batch of 2, got 1"):
        layer(x, context[:1])
    if encoding is not None:
        with pytest.raises(ValueError, match="positions and key_positions must be given both"):
            layer(x, context, positions=torch.arange(9))
