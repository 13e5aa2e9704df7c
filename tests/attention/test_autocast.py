"""Autocast: inputs go to its dtype as those of softmax attention do; sums stay float32."""

import functools

import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions, traced
from torch.nn import functional as F

from fastpe import (
    Favor,
    causal_linear_attention,
    causal_linear_attention_step,
    distributed,
    linear_attention,
)
from fastpe.nn import CausalLinearAttention, LinearAttention

LOW = torch.bfloat16
some = pytest.mark.parametrize(
    "make", encodings("none", "rope", "sinespe", "fstripe-pooled", "convspe", "custom")
)


def _mixed():
    """What rotary embeddings and norms leave under autocast: float32 q and k, low-precision v."""
    q, k, v = make_inputs(2, 9, 3, 8, 6, torch.float32)
    return q, k, v.to(LOW)


def _both(attend, *tensors):
    """Return outputs and gradients under autocast, and of the same call on tensors cast before."""
    found = []
    for enabled in (True, False):
        leaves = [leaf(x) for x in tensors]
        given = leaves if enabled else [x.to(LOW) for x in leaves]
        with torch.autocast("cpu", LOW, enabled=enabled):
            outputs = attend(*given)
        loss = sum(x.float().square().sum() for x in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return found


@some
def test_function(backend, make):
    encoding = make(8, 3)
    positions = make_positions(encoding, 2, 9)

    def attend(q, k, v):
        options = {"pos_encoding": encoding, "positions": positions, "backend": backend}
        o, state = causal_linear_attention(q, k, v, output_final_state=True, **options)
        return o, state.s, state.z

    found, wanted = _both(attend, *_mixed())
    assert all(map(torch.equal, found, wanted))
    o, s, z, dq, dk, dv = found
    assert o.dtype == dv.dtype == LOW
    assert s.dtype == z.dtype == dq.dtype == dk.dtype == torch.float32


@pytest.mark.parametrize("make", encodings("none", "rope-before", "sinespe"))
@pytest.mark.parametrize("psi", ["elu1", "hedgehog", "favor"])
def test_both_ways_and_feature_maps(backend, make, psi):
    if psi == "hedgehog" and make(8, 3) is not None:
        pytest.skip("one encoding is enough")
    from fastpe import Hedgehog

    encoding = make(8, 3)
    width = 8 if encoding is None else encoding.feature_dim
    maps = {"hedgehog": lambda: Hedgehog(width, 3), "favor": lambda: Favor(8, seed=1)}
    options = {"pos_encoding": encoding, "backend": backend}
    options["feature_map"] = maps[psi]() if psi in maps else psi
    for function in (linear_attention, causal_linear_attention):
        found, wanted = _both(lambda *x, f=function: (f(*x, **options),), *_mixed())
        assert all(map(torch.equal, found, wanted))
        assert found[0].dtype == LOW


@some
def test_step(backend, make):
    """A state made under autocast goes on outside of it, and the other way round."""
    encoding, (q, k, v) = make(8, 3), _mixed()
    options = {"pos_encoding": encoding, "backend": backend}
    low = [x.to(LOW) for x in (q, k, v)]
    whole = causal_linear_attention(*low, **options)
    with torch.autocast("cpu", LOW):
        prefix = [x[:, :7] for x in (q, k, v)]
        _, state = causal_linear_attention(*prefix, output_final_state=True, **options)
        token = (x[:, 7] for x in (q, k, v))
        o, state = causal_linear_attention_step(*token, state, **options)
    assert o.dtype == LOW
    assert state.s.dtype == torch.float32
    assert_within(o.float(), whole[:, 7].float(), 2**-7)
    o, _ = causal_linear_attention_step(*(x[:, 8] for x in low), state, **options)
    assert_within(o.float(), whole[:, 8].float(), 2**-7)


def test_dtypes_are_those_of_softmax_attention(backend):
    """Also where autocast changes nothing: float64, and a device that it is not on for."""
    q, k, v = _mixed()

    def dtypes(*tensors):
        swapped = (x.transpose(1, 2) for x in tensors)
        return (
            causal_linear_attention(*tensors, backend=backend).dtype,
            F.scaled_dot_product_attention(*swapped).dtype,
        )

    for given in ((q, k, v), (q, k, v.float()), (q.half(), k, v), (q.double(),) * 3):
        with torch.autocast("cpu", LOW):
            ours, theirs = dtypes(*given)
        assert ours == theirs
    with torch.autocast("cpu", LOW), pytest.raises(TypeError, match="k must have the dtype of q"):
        causal_linear_attention(q.double(), k, v, backend=backend)
    with pytest.raises(TypeError, match="v must have the dtype of q"):
        causal_linear_attention(q, k, v, backend=backend)
    with torch.autocast("cpu", LOW), torch.autocast("cpu", enabled=False):
        assert causal_linear_attention(q, k, v.float(), backend=backend).dtype == torch.float32


@some
def test_layer(backend, make):
    """Projections in bfloat16, sums in float32, gradients near those without autocast."""
    torch.manual_seed(3)
    layer = CausalLinearAttention(12, 3, pos_encoding=make(4, 3), backend=backend).eval()
    x = torch.randn(2, 80, 12)
    positions = make_positions(layer.pos_encoding, 2, 80)

    def run(enabled):
        layer.zero_grad()
        with torch.autocast("cpu", LOW, enabled=enabled):
            y, state = layer(x, positions=positions, output_final_state=True)
            last = None if positions is None else positions[:, -1] + 1
            if last is not None and layer.pos_encoding.num_levels == 1:
                last = last[:, 0]
            after, _ = layer.step(x[:, 0], state, positions=last)
        (y.float().square().sum() + after.float().square().sum()).backward()
        return y, after, state.s, *(p.grad.clone() for p in layer.parameters())

    found, wanted = run(True), run(False)
    assert found[0].dtype == found[1].dtype == LOW
    assert found[2].dtype == torch.float32
    for actual, expected in zip(found[:3], wanted[:3], strict=True):
        assert_within(actual.float(), expected, 3e-2)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found[3:])


def test_layer_both_ways():
    torch.manual_seed(3)
    layer = LinearAttention(12, 3)
    x, context = torch.randn(2, 9, 12), torch.randn(2, 5, 12)
    with torch.autocast("cpu", LOW):
        y = layer(x, context)
    assert y.dtype == LOW
    assert_within(y.float(), layer(x, context), 3e-2)


@traced
@pytest.mark.parametrize("make", encodings("none", "sinespe"))
def test_compiled(native_kernels, compiled, make):
    q, k, v = _mixed()
    attend = functools.partial(
        causal_linear_attention, pos_encoding=make(8, 3), backend=native_kernels
    )
    with torch.autocast("cpu", LOW):
        assert torch.equal(compiled(attend)(q, k, v), attend(q, k, v))


def _over_ranks(group, backend):
    rank = torch.distributed.get_rank(group)
    encoding = encodings("sinespe")[0].values[0](8, 3)
    torch.manual_seed(0)
    q, k, v = _mixed()
    piece = slice(0, 5) if rank == 0 else slice(5, None)
    options = {"pos_encoding": encoding, "output_final_state": True, "backend": backend}
    with torch.autocast("cpu", LOW):
        o, state = distributed.causal_linear_attention(
            *(x[:, piece] for x in (q, k, v)), group=group, **options
        )
    low = [x.to(LOW) for x in (q, k, v)]
    whole, after = causal_linear_attention(*low, **options)
    assert o.dtype == LOW
    assert_within(o.float(), whole[:, piece].float(), 2**-7)
    assert_within(state.s, after.s, 1e-5)


def test_over_ranks(ranks):
    ranks(2, _over_ranks, "auto")
