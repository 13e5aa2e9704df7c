"""torch's FLOP counter: the operators count as the matrix products that they are made of."""

import importlib
import itertools
import math
import sys

import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastpe
from fastpe import causal_linear_attention, causal_linear_attention_step
from fastpe.attention import banded
from fastpe.ops import conv_features as conv
from fastpe.ops import flops


def _count(function, *args, **options):
    """Return the FLOPs of a call, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = function(*args, **options)
    return counter.get_total_flops(), result


def _starts(t, chunk):
    return [slice(i, min(i + chunk, t)) for i in range(0, t, chunk)]


def _forward(q, k, v, chunk):
    """Causal attention of [H, T, .] by chunks."""
    state, out = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), []
    for at in _starts(q.shape[1], chunk):
        a, b, c = q[:, at], k[:, at], v[:, at]
        out.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(out, 1)


def _backward(q, k, v, g, chunk):
    """Its gradients: three more scans, the last two with one state."""
    dq = _forward(g, v, k, chunk)
    state, dk, dv = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), [], []
    # the short chunk is the last one that is read, so the first of the tokens
    for at in _starts(q.shape[1], chunk):
        a, b, c, d = (x.flip(1)[:, at] for x in (q, k, v, g))
        dk.append((c @ d.mT).tril() @ a + c @ state.mT)
        dv.append((b @ a.mT).tril() @ d + b @ state)
        state = state + a.mT @ d
    return dq, torch.cat(dk, 1).flip(1), torch.cat(dv, 1).flip(1)


@pytest.mark.parametrize(("t", "chunk"), [(64, 16), (75, 16), (5, 16), (130, None)])
def test_scan_is_counted_as_its_products(native_kernels, t, chunk):
    q, k, v = (leaf(x) for x in make_inputs(2, t, 3, 8, 6))
    g, _, _ = make_inputs(2, t, 3, 6, 1, seed=1)
    options = {"feature_map": "identity", "normalize": False, "chunk_size": chunk}
    forward, o = _count(causal_linear_attention, q, k, v, backend=native_kernels, **options)
    backward, grads = _count(torch.autograd.grad, o, (q, k, v), g)
    by_head = [x.detach().transpose(1, 2).flatten(0, 1) for x in (q, k, v, g)]
    expected, plain = _count(_forward, *by_head[:3], chunk or 64)
    assert_within(o.transpose(1, 2).flatten(0, 1), plain, 1e-12)
    assert forward == expected > 0
    expected, plain = _count(_backward, *by_head, chunk or 64)
    for x, y in zip(grads, plain, strict=True):
        assert_within(x.transpose(1, 2).flatten(0, 1), y, 1e-12)
    assert backward == expected


def test_only_what_is_needed_counts(native_kernels):
    q, k, v = make_inputs(1, 32, 1, 8, 8)
    pairs, tokens = 2 * 32 * 32 * 16, 2 * 32 * 64
    for needs, expected in (("q", pairs + 2 * tokens), ("v", pairs + 2 * tokens)):
        inputs = {"q": q, "k": k, "v": v}
        x = inputs[needs] = leaf(inputs[needs])
        o = causal_linear_attention(*inputs.values(), chunk_size=32, backend=native_kernels)
        assert _count(torch.autograd.grad, o.sum(), x)[0] == expected


@pytest.mark.parametrize("make", encodings("-custom"))
@pytest.mark.parametrize("heads", [1, 3])
def test_every_backend_counts_the_same(kernels, make, heads):
    """As the reference, which is PyTorch and counts itself."""
    encoding = make(8, 3)
    (q, _, _), (_, k, v) = (make_inputs(2, 64, h, 8, 6) for h in (3, heads))
    if encoding is not None:
        encoding.double()
    options = {"pos_encoding": encoding, "positions": make_positions(encoding, 2, 64)}
    with torch.no_grad():
        found, _ = _count(causal_linear_attention, q, k, v, backend=kernels, **options)
        expected, _ = _count(causal_linear_attention, q, k, v, backend="reference", **options)
    assert found == expected > 0


def test_steps_are_counted(native_kernels):
    """A chunk of one token; without the counter a step calls no operator at all."""
    q, k, v = make_inputs(2, 9, 3, 8, 6)
    options = {"pos_encoding": fastpe.RoPE(8), "backend": native_kernels}
    with torch.no_grad():
        _, state = causal_linear_attention(q, k, v, output_final_state=True, **options)
        token = q[:, 0], k[:, 0], v[:, 0]
        found, (o, _) = _count(causal_linear_attention_step, *token, state, **options)
        assert torch.equal(o, causal_linear_attention_step(*token, state, **options)[0])
    assert found == 2 * (2 * 3 * (8 + 6 + 2 * 8 * 6) + 2 * 4)


def test_packed_sequences_have_chunks_of_their_own(native_kernels):
    q, k, v = make_inputs(1, 100, 2, 8, 6)
    bounds = torch.tensor([0, 10, 10, 70, 100])
    options = {"chunk_size": 16, "backend": native_kernels}
    packed, _ = _count(causal_linear_attention, q, k, v, cu_seqlens=bounds, **options)
    alone = sum(
        _count(causal_linear_attention, *(x[:, a:b] for x in (q, k, v)), **options)[0]
        for a, b in itertools.pairwise(bounds)
    )
    assert packed == alone > 0


def test_tensors_without_memory_are_counted(native_kernels):
    """Where sequences end is not known then: as one sequence."""
    q, k, v = make_inputs(1, 100, 2, 8, 6)
    options = {"chunk_size": 16, "backend": native_kernels}
    expected, _ = _count(causal_linear_attention, q, k, v, **options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        bounds = mode.from_tensor(torch.tensor([0, 10, 100]))
        assert _count(causal_linear_attention, *fakes, **options)[0] == expected
        found, _ = _count(causal_linear_attention, *fakes, cu_seqlens=bounds, **options)
    assert found == expected


def test_sines_are_counted_as_their_products(native_kernels):
    """The gradient makes phases again, and gives a product each to positions and frequencies."""
    encoding = fastpe.SineSPE(8, 3, num_sines=3, num_realizations=10, seed=1).double()
    x, _, _ = make_inputs(2, 20, 3, 8, 1)
    g, _, _ = make_inputs(2, 20, 3, 10, 1, seed=1)
    positions = torch.rand(2, 20, 1, dtype=torch.float64) * 30
    with torch.no_grad():
        sines = encoding.make_maps()[0]
    gain, noise = sines.gain, sines.noise

    def plain():
        du = torch.einsum("bthr,hdjr->bthdj", g, noise)
        angle = 2 * math.pi * (torch.tensordot(positions, sines.freq, ([2], [3])) + sines.offset)
        cos, sin = du[..., 0:-1:2] * gain, du[..., 1:-1:2] * gain
        dx = (cos * angle.cos() + sin * angle.sin()).sum(-1) + du[..., -1] * sines.gate
        turn = 2 * math.pi * x[..., None] * (sin * angle.cos() - cos * angle.sin())
        dfreq = torch.tensordot(turn, positions, ([0, 1], [0, 1]))
        dpositions = torch.tensordot(turn, sines.freq, ([2, 3, 4], [0, 1, 2]))
        return dx, dpositions, dfreq

    arguments = x, positions, *sines, True, native_kernels
    needs = [True, True, True, False, False, False]
    found, grads = _count(torch.ops.fastpe.sine_features_backward, g, *arguments, needs)
    expected, wanted = _count(plain)
    for actual, exact in zip(grads, wanted, strict=False):
        assert_within(actual, exact, 1e-11)
    assert found == expected
    found, _ = _count(torch.ops.fastpe.sine_features, *arguments)
    assert found == 2 * 2 * 20 * 3 * 8 * 3 + 2 * 2 * 20 * 3 * 8 * 7 * 10


@pytest.mark.parametrize("shared", [False, True])
def test_codes_are_counted_as_their_products(shared):
    """ConvSPE's features: what the loops themselves call, which run inside the operator."""
    x, _, _ = make_inputs(2, 90, 2, 4, 1)
    positions = torch.randint(-99, 99, (1 if shared else 2, 90, 1)).double()
    seed, step = torch.tensor(3), torch.tensor(4)
    weight, constant = torch.rand(2, 4, 7).double(), torch.rand(2, 4, 6).double()
    fir = weight, constant, seed, step, 5, 6
    found, y = _count(torch.ops.fastpe.conv_features, x, positions, *fir)
    assert found == _count(conv._forward, x, positions, conv.Filter(*fir))[0] > 0
    for needs in ([True, False, False], [False, True, True], [True, True, True]):
        found, _ = _count(torch.ops.fastpe.conv_features_backward, y, x, positions, *fir, needs)
        assert found == _count(conv._backward, y, x, positions, conv.Filter(*fir), needs)[0]


def test_bands_are_counted_as_their_products():
    """Weights to kappa keys and a sum of as many values for each query; T x T with two zeros."""
    q, k, v = make_inputs(2, 12, 2, 4, 3)
    kernel = torch.ones(2, 4, 5).double()
    found, o = _count(banded.banded_attention, leaf(q), k, v, kernel)
    # with a value more, that adds up weights
    assert found == 2 * 2 * 2 * 12 * 5 * (4 + 4)
    assert _count(o.sum().backward)[0] == 2 * 2 * 2 * 12 * 5 * (4 * 4 + 2 * 4)


def test_layers_count_with_everything_else(native_kernels):
    layer = fastpe.nn.CausalLinearAttention(12, 3, pos_encoding=fastpe.RoPE(4))
    x = torch.randn(2, 64, 12)
    total, _ = _count(layer, x)
    with torch.no_grad():
        linear = sum(_count(part, x)[0] for part in (layer.in_proj, layer.out_proj))
    assert total > linear > 0


def test_the_counter_is_not_imported_before_it_is_asked_for(monkeypatch):
    """Whoever imports it first, it has the formulas; nothing stays behind to watch."""
    monkeypatch.setattr(torch.utils, "flop_counter", torch.utils.flop_counter)
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")
    before = list(sys.meta_path)
    flops.watch()
    assert len(sys.meta_path) == len(before) + 1
    assert "torch.utils.flop_counter" not in sys.modules
    counter = importlib.import_module("torch.utils.flop_counter")
    assert sys.meta_path == before
    for name in flops._FORMULAS:
        assert getattr(torch.ops.fastpe, name) in counter.flop_registry


def test_every_operator_has_a_formula():
    """But for those without a product: noise, and the count of its steps."""
    names = {
        x.partition("::")[2]
        for x in torch._C._dispatch_get_all_op_names()
        if x.startswith("fastpe::")
    }
    assert names - set(flops._FORMULAS) <= {"philox_normal", "count_forward"}
