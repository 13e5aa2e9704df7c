"""FAVOR+: attention that is exact and causal for inputs of any size, with every encoding."""

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions

import fastpe
from fastpe import DPFP, Favor, RoPE, SineSPE
from fastpe.attention import favor, linear

B, T, H, D, E = 2, 37, 3, 8, 6
EXACT = encodings("sinespe-exact", "fstripe-unpooled", "fstripe-vector")


def _exponents(psi, x):
    return oracle.favor_exponents(psi.omega(x.shape[-2], x.shape[-1], x.dtype), x)


def _encoding(make, heads=H):
    encoding = make(D, heads)
    if encoding is None:
        return None
    if isinstance(encoding, RoPE):
        encoding.apply_order = "before"
    return encoding.double()


def _sides(encoding, q, k, positions):
    if encoding is None:
        return q, k
    return encoding.features(q, positions, "q"), encoding.features(k, positions, "k")


def _expected(psi, encoding, q, k, v, positions):
    q, k = _sides(encoding, q, k, positions)
    (a, _), (b, half_square) = _exponents(psi, q), _exponents(psi, k)
    return oracle.log_attention(a, b - half_square, v)


def _attend(psi, *inputs, **options):
    return fastpe.causal_linear_attention(*inputs, feature_map=psi, **options)


@pytest.mark.parametrize("scale", [1, 8], ids=["level", "steep"])
def test_output_and_every_gradient(backend, make_encoding, scale):
    """Against brute force in log space, on both paths."""
    encoding, psi = _encoding(make_encoding), Favor(14, seed=3)
    q, k, v = make_inputs(B, T, H, D, E)
    q, k, v = leaf(q), leaf(scale * k), leaf(v)
    positions = make_positions(encoding, B, T)
    o = _attend(psi, q, k, v, pos_encoding=encoding, positions=positions, backend=backend)
    wanted = _expected(psi, encoding, q, k, v, positions)
    assert_within(o, wanted, 1e-11)
    leaves = [q, k, v] + ([] if encoding is None else list(encoding.parameters()))
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, leaves, weight)
    for g, exact in zip(found, torch.autograd.grad(wanted, leaves, weight), strict=True):
        assert_within(g, exact, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope-before", "sinespe", "sinespe-exact"))
def test_inputs_of_any_size(backend, make, dtype):
    """T12: inputs x200 agree with log space; output and gradients are finite."""
    encoding, psi = _encoding(make), Favor(14, seed=3)
    q, k, v = make_inputs(B, 70, H, D, E, dtype)
    q, k, v = leaf(200 * q), leaf(200 * k), leaf(v)
    o = _attend(psi, q, k, v, pos_encoding=encoding, backend=backend)
    positions = torch.arange(70.0)[None, :, None].double()
    wanted = _expected(psi, encoding, q.double(), k.double(), v.double(), positions)
    assert_within(o, wanted, 1e-8 if dtype == torch.float64 else 1e-4)
    for g in torch.autograd.grad(o.square().sum(), (q, k, v)):
        assert g.isfinite().all()


@pytest.mark.parametrize("scale", [1, 200])
def test_nothing_leaks(backend, make_encoding, scale):
    """T12: a last key that grows or vanishes leaves all outputs before it alone."""
    encoding, psi = _encoding(make_encoding), Favor(14, seed=3)
    q, k, v = make_inputs(B, T, H, D, E)
    positions = make_positions(encoding, B, T)
    options = {"pos_encoding": encoding, "positions": positions, "backend": backend}
    before = _attend(psi, scale * q, scale * k, v, **options)
    for factor in (8, 0):
        changed = k.clone()
        changed[:, -1] *= factor
        after = _attend(psi, scale * q, scale * changed, v, **options)
        assert_within(after[:, :-1], before[:, :-1], 1e-13)
    # a key of zeros has the largest features where |k|^2 is in the thousands
    assert not torch.equal(after[:, -1], before[:, -1])


@pytest.mark.parametrize("scale", [1, 50], ids=["level", "steep"])
def test_prefill_and_step(backend, make_encoding, scale):
    """T5: whole, in pieces and token by token; the state's sums too."""
    encoding, psi = _encoding(make_encoding), Favor(14, seed=3)
    q, k, v = make_inputs(B, 12, H, D, E)
    q, k = scale * q, scale * k
    positions = make_positions(encoding, B, 12)
    options = {"pos_encoding": encoding, "feature_map": psi, "backend": backend}

    def at(piece):
        return None if positions is None else positions[:, piece]

    def run(piece, state):
        return fastpe.causal_linear_attention(
            *(x[:, piece] for x in (q, k, v)),
            positions=at(piece),
            initial_state=state,
            output_final_state=True,
            **options,
        )

    whole, end = run(slice(0, 12), None)
    o, state = run(slice(0, 5), None)
    parts = [o]
    o, state = run(slice(5, 9), state)
    parts.append(o)
    o, state = run(slice(9, 9), state)
    parts.append(o)
    for t in (9, 10, 11):
        position = None if positions is None else positions[:, t]
        position = position if position is None or encoding.num_levels > 1 else position[:, 0]
        o, state = fastpe.causal_linear_attention_step(
            q[:, t], k[:, t], v[:, t], state, positions=position, **options
        )
        parts.append(o[:, None])
    assert_within(torch.cat(parts, 1), whole, 1e-11)
    for name in ("s", "z", "c"):
        assert_within(getattr(state, name), getattr(end, name), 1e-11)
    assert state.length == 12
    assert (end.z >= 1 - 1e-15).all()


def test_empty_sequence(backend):
    q, k, v = make_inputs(B, 0, H, D, E)
    o, state = _attend(Favor(14), q, k, v, output_final_state=True, backend=backend)
    assert o.shape == (B, 0, H, E)
    q, k, v = make_inputs(B, 6, H, D, E)
    psi = Favor(14, seed=1)
    state = state._replace(noise=psi.noise_key)
    resumed = _attend(psi, q, k, v, initial_state=state, backend=backend)
    assert_within(resumed, _attend(psi, q, k, v, backend=backend), 1e-12)


def test_gradient_through_the_state(backend):
    """Of both paths, to every token before."""
    psi = Favor(14, seed=3)
    for scale in (1, 20):
        q, k, v = (leaf(x) for x in make_inputs(B, 12, H, D, E))
        _, state = _attend(
            psi, q[:, :7], scale * k[:, :7], v[:, :7], output_final_state=True, backend=backend
        )
        o = _attend(psi, q[:, 7:], scale * k[:, 7:], v[:, 7:], initial_state=state, backend=backend)
        wanted = _expected(psi, None, q, scale * k, v, None)[:, 7:]
        weight = torch.randn_like(o)
        found = torch.autograd.grad(o, (q, k, v), weight)
        exact = torch.autograd.grad(wanted, (q, k, v), weight)
        for actual, g in zip(found, exact, strict=True):
            assert_within(actual, g, 1e-9)


def test_second_derivatives():
    psi, inputs = Favor(4, seed=3), make_inputs(1, 5, 1, 2, 2)
    q, k, v = (leaf(x) for x in inputs)

    def run(q, k, v):
        return _attend(psi, q, k, v, backend="reference")

    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("make", EXACT)
def test_one_stage_is_the_composition(backend, make, per_head):
    """Projections of D and a norm without positions, against features that are made."""
    encoding, psi = _encoding(make), Favor(14, per_head=per_head, seed=3)
    q, k, _ = make_inputs(B, T, H, D, E)
    positions = make_positions(encoding, B, T)
    maps = encoding.make_maps()
    for x, side, position_map in ((q, "q", maps[0]), (k, "k", maps[1])):
        found = psi.exponents(x, positions, position_map, backend)
        wanted = _exponents(psi, encoding.features(x, positions, side))
        for actual, exact in zip(found, wanted, strict=True):
            assert_within(actual, exact, 1e-12)


def test_kernels_need_not_take_the_sines():
    """Exact sines are as wide as no kernel takes; only maps other than Favor see them."""
    q, _, v = make_inputs(1, 4, 1, 16, E)
    encoding = SineSPE(16, 1, num_sines=10, num_realizations=None)
    assert favor.kernel_sizes(q, v, encoding, Favor(8))[1] == (16, 8, E)
    assert linear.kernel_sizes(q, v, encoding, DPFP())[1] == (672, 672, E)
    assert favor.kernel_sizes(q, v, SineSPE(16, 1), Favor(8))[1] == (64, 8, E)
    assert linear.kernel_sizes(q, v, None, "elu1")[1] == (16, 16, E)


def test_state_without_its_references_is_refused():
    q, k, v = make_inputs(B, 4, H, D, E)
    psi = Favor()
    _, state = _attend(psi, q, k, v, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.c must be of shape \(2, 3, 16\)"):
        _attend(psi, q, k, v, initial_state=state._replace(c=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    """Logarithms and sums in float32; the output is rounded once."""
    q, k, v = make_inputs(B, T, H, D, E, dtype)
    psi = Favor(14, seed=3)
    o, state = _attend(psi, q, k, v, output_final_state=True, backend=backend)
    assert (o.dtype, state.s.dtype, state.c.dtype) == (dtype, torch.float32, torch.float32)
    wanted = _expected(psi, None, q.double(), k.double(), v.double(), None)
    assert_within(o, wanted, torch.finfo(dtype).eps + 1e-4)


@pytest.mark.parametrize("scale", [1, 50], ids=["level", "steep"])
@pytest.mark.parametrize("make", encodings("none", "rope-before", "sinespe-exact"))
def test_padded_and_packed(backend, make, scale):
    """T11: each sequence as it is alone, on either side of padding whose numbers are huge."""
    encoding, psi, lengths = _encoding(make), Favor(14, seed=3), (5, 12)
    options = {"pos_encoding": encoding, "backend": backend}
    alone = []
    for i, length in enumerate(lengths):
        q, k, v = make_inputs(1, length, H, D, E, seed=i)
        q, k = scale * q, scale * k
        alone.append((q, k, v, _attend(psi, q, k, v, **options)))
    packed = [torch.cat(x, 1) for x in zip(*alone, strict=True)]
    ends = torch.tensor([0, 5, 17])
    assert_within(_attend(psi, *packed[:3], cu_seqlens=ends, **options), packed[3], 1e-11)
    for left in (True, False):
        pad = torch.arange(12)[None] < 7 if left else torch.arange(12)[None] >= 5
        padding = torch.cat((pad, torch.zeros(1, 12, dtype=torch.bool)))
        given = [torch.full((2, 12, H, width), 1e30).double() for width in (D, D, E)]
        for x, whole in zip(given, packed[:3], strict=True):
            x[~padding] = whole[0]
        o = _attend(psi, *given, key_padding_mask=padding, **options)
        assert_within(o[~padding], packed[3][0], 1e-11)
        assert o.isfinite().all()


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("scale", [1, 50], ids=["level", "steep"])
def test_shared_key_heads(backend, per_head, scale):
    """Each query head has its own w, for the key that it shares too."""
    psi = Favor(14, per_head=per_head, seed=3)
    q, k, v = make_inputs(B, T, 4, D, E)
    q, k, v = leaf(q), leaf(scale * k[:, :, :2]), leaf(v[:, :, :2])
    o = _attend(psi, q, k, v, backend=backend)
    repeated = (x.repeat_interleave(2, 2) for x in (k, v))
    wanted = _expected(psi, None, q, *repeated, None)
    assert_within(o, wanted, 1e-11)
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), weight)
    for g, exact in zip(found, torch.autograd.grad(wanted, (q, k, v), weight), strict=True):
        assert_within(g, exact, 1e-8)


@pytest.mark.parametrize("scale", [1, 200])
def test_attention_to_every_key(backend, scale):
    """The same for `linear_attention`: a softmax of logarithms over all keys."""
    psi = Favor(14, seed=3)
    q, k, v = make_inputs(B, T, H, D, E)
    q, k, v = leaf(scale * q), leaf(scale * k), leaf(v)
    o = fastpe.linear_attention(q, k, v, feature_map=psi, backend=backend)
    (a, _), (b, half_square) = _exponents(psi, q), _exponents(psi, k)
    logits = (a[:, :, None] + (b - half_square)[:, None]).logsumexp(-1)  # [B, Tq, Tk, H]
    wanted = torch.einsum("bmnh,bnhe->bmhe", logits.softmax(2), v)
    assert_within(o, wanted, 1e-10)
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), weight)
    exact = torch.autograd.grad(wanted, (q, k, v), weight)
    assert all(g.isfinite().all() for g in found)
    assert_within(found[2], exact[2], 1e-10)


@pytest.mark.parametrize("growth", [0.2, 6], ids=["smaller", "larger"])
@pytest.mark.parametrize("align", ["end", "start"])
def test_further_keys_after_a_state(backend, align, growth):
    """Two states are added, each measured from its own running maximum: whichever is larger."""
    psi = Favor(14, seed=3)
    q, k, v = make_inputs(B, T, H, D, E)
    k[:, 10:] *= growth
    options = {"output_final_state": True, "backend": backend}
    whole, end = _attend(psi, q, k, v, **options)
    _, state = _attend(psi, *(x[:, :10] for x in (q, k, v)), **options)
    seen = slice(T - 5, None) if align == "end" else slice(10, 15)
    o, after = _attend(
        psi, q[:, seen], k[:, 10:], v[:, 10:], initial_state=state, align=align, **options
    )
    assert_within(o, whole[:, seen], 1e-11)
    assert_within(after.c, end.c, 1e-12)
    assert_within(after.s, end.s, 1e-11)
    assert_within(after.z, end.z, 1e-11)
