"""linear_attention: every query and every key, by the weights written out."""

import math

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, make_inputs, make_positions
from test_packing import CU, LENGTHS, PADDING, _double, _gradients, _leaves, _padded_case

import fastpe
from fastpe import linear_attention


def _every_pair(encoding, q, k, v, at_q, at_k, hidden=None):
    """Bidirectional attention by its weights, [B, H, Tq, Tk]."""
    params = {} if encoding is None else dict(encoding.named_parameters())
    phi, _, pd, _ = oracle.streams(encoding, params, q, q, at_q, "elu1", "matmul")
    _, psi, _, kd = oracle.streams(encoding, params, k, k, at_k, "elu1", "matmul")
    weights, sums = (torch.einsum("bthr,bshr->bhts", *x) for x in ((phi, psi), (pd, kd)))
    if hidden is not None:
        weights, sums = (x.masked_fill(hidden[:, None, None], 0) for x in (weights, sums))
    return torch.einsum("bhts,bshe->bthe", weights, v) / (sums.sum(-1).mT[..., None] + 1e-6)


@pytest.mark.parametrize("keys", [9, 14], ids=["self", "cross"])
def test_every_query_sees_every_key(backend, make_encoding, keys):
    encoding = _double(make_encoding, 8, 2)
    q, k, v = make_inputs(2, 14, 2, 8, 5)
    q, k, v = q[:, :9], k[:, :keys], v[:, :keys]
    at_q, at_k = make_positions(encoding, 2, 9), make_positions(encoding, 2, keys, seed=1)
    leaves, wanted = _leaves(encoding, q, k, v)
    o = linear_attention(
        *leaves.values(),
        pos_encoding=encoding,
        positions=at_q,
        key_positions=at_k,
        backend=backend,
    )
    again, wanted_again = _leaves(encoding, q, k, v)
    expected = _every_pair(encoding, *again.values(), at_q, at_k)
    assert_within(o, expected, 1e-11)
    grads = _gradients((o,), wanted)
    for name, x in _gradients((expected,), wanted_again).items():
        assert_within(grads[name], x, 1e-10, name)


@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe", "custom"))
def test_every_query_sees_every_key_but_padding(backend, make):
    encoding = _double(make, 8, 2)
    q, k, v, _ = _padded_case(encoding, 2, math.nan, False)
    clean = [x.nan_to_num() for x in (q, k, v)]
    leaves, wanted = _leaves(encoding, q, k, v)
    o = linear_attention(
        *leaves.values(),
        pos_encoding=encoding,
        query_padding_mask=PADDING,
        key_padding_mask=PADDING,
        backend=backend,
    )
    at = ((~PADDING).cumsum(1) - 1).clamp(min=0)[..., None].double()
    again, wanted_again = _leaves(encoding, *clean)
    expected = _every_pair(encoding, *again.values(), at, at, PADDING) * ~PADDING[..., None, None]
    assert_within(o, expected, 1e-11)
    grads = _gradients((o,), wanted)
    for name, x in _gradients((expected,), wanted_again).items():
        assert_within(grads[name], x, 1e-10, name)


@pytest.mark.parametrize("make", encodings("none", "ropepool", "fstripe-sff"))
def test_every_query_sees_every_key_of_its_sequence(backend, make):
    encoding = _double(make, 8, 2)
    q, k, v = make_inputs(1, sum(LENGTHS), 2, 8, 5)
    bounds = torch.tensor([0, 10, 10, 30, 53, 53])
    options = {"pos_encoding": encoding, "backend": backend}
    o = linear_attention(q, k, v, cu_seqlens=CU, key_cu_seqlens=bounds, **options)
    for i in range(len(LENGTHS)):
        here, there = slice(CU[i], CU[i + 1]), slice(bounds[i], bounds[i + 1])
        expected = linear_attention(q[:, here], k[:, there], v[:, there], **options)
        assert_within(o[:, here], expected, 1e-12)


@pytest.mark.parametrize("make", encodings("none", "sinespe"))
def test_nan_stays_in_its_sequence(backend, make):
    encoding = _double(make, 8, 2)
    q, k, v = make_inputs(1, 9, 2, 8, 5)
    for x in (q, k, v):
        x[:, :4] = math.nan
    leaves, wanted = _leaves(encoding, q, k, v)
    o = linear_attention(
        *leaves.values(),
        pos_encoding=encoding,
        cu_seqlens=torch.tensor([0, 4, 9]),
        backend=backend,
    )
    grads = _gradients((o[:, 4:],), wanted)
    for name in ("dq", "dk", "dv"):
        assert grads[name][:, 4:].isfinite().all(), name


@pytest.mark.parametrize(("feature_map", "normalize"), [("identity", "abs"), ("dpfp", True)])
def test_padding_divides_by_nothing(backend, feature_map, normalize):
    q, k, v = make_inputs(1, 6, 1, 4, 3)
    padding = torch.tensor([[True, True, False, False, False, True]])
    leaves, wanted = _leaves(None, q, k, v)
    o = linear_attention(
        *leaves.values(),
        query_padding_mask=padding,
        key_padding_mask=padding,
        feature_map=feature_map,
        normalize=normalize,
        eps=0,
        backend=backend,
    )
    grads = _gradients((o,), wanted)
    assert all(x[~padding].isfinite().all() for x in grads.values())
    assert not any(x[padding].any() for x in grads.values())


def test_positions_of_keys_packed_in_another_way(backend):
    q, k, v = make_inputs(1, 6, 1, 4, 3)
    encoding = fastpe.RoPE(4).double()
    bounds = {"cu_seqlens": torch.tensor([0, 2, 6]), "key_cu_seqlens": torch.tensor([0, 4, 6])}
    options = bounds | {"pos_encoding": encoding, "backend": backend}
    at = {
        "positions": torch.tensor([0, 1, 0, 1, 2, 3]),
        "key_positions": torch.tensor([0, 1, 2, 3, 0, 1]),
    }
    expected = linear_attention(q, k, v, **options)
    assert torch.equal(linear_attention(q, k, v, **at, **options), expected)
    for name, x in at.items():
        with pytest.raises(ValueError, match="must be given both or neither"):
            linear_attention(q, k, v, **{name: x}, **options)


def test_exact_convspe_has_no_features(backend):
    q, k, v = make_inputs(1, 6, 1, 4, 3)
    encoding = fastpe.ConvSPE(4, 1, kernel_size=3, num_realizations=None).double()
    for feature_map, normalize in (("identity", False), (fastpe.Favor(8), True)):
        with pytest.raises(ValueError, match="pos_encoding must have features"):
            linear_attention(
                *(q, k, v),
                pos_encoding=encoding,
                feature_map=feature_map,
                normalize=normalize,
                backend=backend,
            )
