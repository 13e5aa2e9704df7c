"""FAVOR+: its noise, its kernel, and attention that is exact and causal for inputs of any size."""

import copy
import math

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions, traced
from torch.utils.checkpoint import checkpoint

import fastpe
from fastpe import Favor, FStripe, RoPE, SineSPE, noise
from fastpe.favor import _level, favor_attention
from fastpe.log_scan import divided, log_scan
from fastpe.nn import CausalLinearAttention

B, T, H, D, E = 2, 37, 3, 8, 6
EXACT = encodings("sinespe-exact", "fstripe-unpooled", "fstripe-vector")


def _encoding(make, heads=H):
    encoding = make(D, heads)
    if encoding is None:
        return None
    if isinstance(encoding, RoPE):
        encoding.apply_order = "before"
    return encoding.double()


def _exponents(psi, x):
    """+-w . y and |y|^2 / 2, from MATH section 7."""
    y = x * x.shape[-1] ** -0.25
    w = psi.omega(x.shape[-2], x.shape[-1], x.dtype)
    dots = torch.stack([y[..., h, :] @ w[h] for h in range(x.shape[-2])], -2)
    return torch.cat((dots, -dots), -1), y.square().sum(-1, keepdim=True) / 2


def _brute(a, b, v):
    """Attention in log space: a softmax over every key up to the query's own."""
    logits = (a.transpose(1, 2)[:, :, :, None] + b.transpose(1, 2)[:, :, None]).logsumexp(-1)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def _sides(encoding, q, k, positions):
    if encoding is None:
        return q, k
    return encoding.features(q, positions, "q"), encoding.features(k, positions, "k")


def _expected(psi, encoding, q, k, v, positions):
    q, k = _sides(encoding, q, k, positions)
    (a, _), (b, half_square) = _exponents(psi, q), _exponents(psi, k)
    return _brute(a, b - half_square, v)


def _attend(psi, *inputs, **options):
    return fastpe.causal_linear_attention(*inputs, feature_map=psi, **options)


# noise


def test_omega_is_philox_made_orthogonal():
    """Blocks of F columns are orthogonal, and each keeps its own length."""
    psi = Favor(2 * 20, seed=1234)
    w = psi.omega(H, D, torch.float64)
    z = oracle.normal(1234, 0, 0, 3, H, D, 20)
    assert_within(w.norm(dim=-2), z.norm(dim=-2), 1e-14)
    for block in w.split(D, -1):
        gram = block.mT @ block
        assert_within(torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), gram, 1e-14)
    # Gram-Schmidt, first column first
    assert_within(w[..., 0], z[..., 0], 1e-14)
    first, second = z[..., 0], z[..., 1]
    second = second - (second * first).sum(-1, True) / first.square().sum(-1, True) * first
    second = second / second.norm(dim=-1, keepdim=True) * z[..., 1].norm(dim=-1, keepdim=True)
    assert_within(w[..., 1], second, 1e-13)
    assert_within(Favor(2 * 20, seed=1234, orthogonal=False).omega(H, D, torch.float64), z, 1e-14)


def test_directions_are_uniform():
    """Entries of Haar frames: mean 0, variance 1/F, fourth moment 3 / (F (F + 2))."""
    z = torch.randn(4000, 4, 4, dtype=torch.float64)
    w = noise.orthogonalized(z)
    u = w / w.norm(dim=-2, keepdim=True)
    for column in range(4):
        x, n = u[..., column], 16000
        assert abs(x.mean()) < 5 * (1 / 4 / n) ** 0.5
        assert abs(x.square().mean() - 1 / 4) < 5 * (1 / 8 / n) ** 0.5
        assert abs((x**4).mean() - 1 / 8) < 5 * (1 / 8 / n) ** 0.5
        # a column stands on the side of the one that it was made of
        assert ((x * z[..., column]).sum(-1) > 0).all()


def test_heads_have_one_omega_or_their_own():
    shared, own = Favor(per_head=False, seed=1).omega(3, 4), Favor(seed=1).omega(3, 4)
    assert torch.equal(shared[0], shared[2])
    assert torch.equal(shared[0], own[0])
    assert not torch.equal(own[0], own[2])


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_kernel_is_unbiased(orthogonal, signs):
    """The mean over draws is exp(q . k / sqrt(F)) within 5 sigma."""
    q, k = 0.7 * torch.randn(2, 1, 6, dtype=torch.float64)
    draws = 4000
    psi = Favor(12, orthogonal=orthogonal, signs=signs, seed=2)
    # heads are independent draws
    phi, omega = (psi(x.expand(draws, 6)) for x in (q, k))
    kernels = (phi * omega).sum(-1)
    wanted = math.exp((q * k).sum() / math.sqrt(6))
    assert abs(kernels.mean() - wanted) < 5 * kernels.std() / draws**0.5
    assert kernels.std() > 0.01 * wanted


def test_default_number_of_features():
    assert Favor().feature_dim(D) == 2 * D
    assert Favor(signs=False).feature_dim(D) == D
    assert Favor(14).feature_dim(D) == 14
    assert Favor(14)(torch.randn(5, H, D)).shape == (5, H, 14)


# attention


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


@pytest.mark.parametrize("scale", [1, 50, 1e4])
def test_scan_of_logarithms(scale):
    """The denominator is at least 1; no later token changes a bit; any chunk gives the same."""
    a, b, v = make_inputs(B, T, H, D, E)
    a, b = scale * a, scale * b
    num, den, state = log_scan(a, b, v)
    assert den.min() >= 1 - 1e-15
    assert_within(divided(num, den), _brute(a, b, v), 1e-14 * max(scale, 1))
    for size in (1, 2, 16, 100):
        again, weights, end = log_scan(a, b, v, chunk_size=size)
        assert_within(divided(again, weights), divided(num, den), 1e-13 * scale)
        assert_within(end[0], state[0], 1e-13 * scale)
        assert torch.equal(end[2], state[2])
    for t in (0, 5, T - 1):
        later = b.clone()
        later[:, t:] += 8 * scale
        changed, weights, _ = log_scan(a, later, v)
        assert torch.equal(changed[:, :t], num[:, :t])
        assert torch.equal(weights[:, :t], den[:, :t])
    first = log_scan(a[:, :20], b[:, :20], v[:, :20])
    num, den, end = log_scan(a[:, 20:], b[:, 20:], v[:, 20:], first[2])
    assert_within(divided(num, den), _brute(a, b, v)[:, 20:], 1e-13 * scale)
    assert_within(end[1], state[1], 1e-13 * scale)


@pytest.mark.parametrize("growth", [39, 41], ids=["level", "steep"])
def test_largest_growth_that_is_level(native_kernels, growth):
    """In float32, on either side of the bound: late keys outgrow the first by e^40."""
    a, b, v = make_inputs(B, T, H, D, E)
    # half of the features grow; queries see them when they have outgrown the others
    ramp = torch.linspace(0, growth, T, dtype=torch.float64)[:, None, None] * (torch.arange(D) < 4)
    b = b.clamp(-0.4, 0.4) + ramp
    a = a - 0.7 * growth * (torch.arange(D) < 4)
    inputs = [leaf(x, torch.float32) for x in (a, b, v)]
    assert _level(inputs[1], None, native_kernels) == (growth < 40)
    o = favor_attention(*inputs, None, None, native_kernels)[0]
    wide = [leaf(x, torch.float64) for x in inputs]
    wanted = _brute(*wide)
    # what rounding makes of exponents of this size
    tolerance = 4 * growth * torch.finfo(torch.float32).eps
    assert_within(o, wanted, tolerance)
    found = torch.autograd.grad(o.sin().sum(), inputs)
    for g, exact in zip(found, torch.autograd.grad(wanted.sin().sum(), wide), strict=True):
        assert_within(g, exact, 4 * tolerance)


@pytest.mark.parametrize("scale", [1, 200])
def test_masked_keys(scale):
    """Logarithms of -inf are left out; what has seen no key is 0, its gradients too."""
    a, b, v = make_inputs(B, T, H, D, E)
    a, b, v = leaf(scale * a), leaf(scale * b), leaf(v)
    hidden = (torch.arange(T) < 5) | (torch.arange(T) == 20)
    masked = b.masked_fill(hidden[:, None, None], -torch.inf)
    num, den, state = log_scan(a, masked, v, chunk_size=4)
    o = divided(num, den)
    assert not o[:, :5].any()
    seen = [t for t in range(T) if not hidden[t]]
    kept = _brute(a[:, seen], b[:, seen], v[:, seen])
    assert_within(o[:, seen], kept, 1e-13 * scale)
    grads = torch.autograd.grad(o.sin().sum(), (a, b, v))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:, :5].any() for g in grads)
    nothing = log_scan(a[:, :5], masked[:, :5], v[:, :5])[2]
    resumed = divided(*log_scan(a[:, 5:], masked[:, 5:], v[:, 5:], nothing)[:2])
    assert_within(resumed, o[:, 5:], 1e-13 * scale)
    assert_within(divided(*log_scan(a, masked, v)[:2]), o, 1e-13 * scale)
    assert state[2].isfinite().all()


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


# one stage


@pytest.mark.parametrize("make", EXACT)
def test_one_stage_is_the_composition(backend, make):
    """Projections of D and a norm without positions, against features that are made."""
    encoding, psi = _encoding(make), Favor(14, seed=3)
    q, k, _ = make_inputs(B, T, H, D, E)
    positions = make_positions(encoding, B, T)
    maps = encoding.position_maps()
    for x, side, position_map in ((q, "q", maps[0]), (k, "k", maps[1])):
        found = psi.exponents(x, positions, position_map, backend)
        wanted = _exponents(psi, encoding.features(x, positions, side))
        for actual, exact in zip(found, wanted, strict=True):
            assert_within(actual, exact, 1e-12)


@pytest.mark.parametrize(
    "make",
    [lambda: SineSPE(4, 1, num_sines=2, num_realizations=None), lambda: FStripe(4, 1, pool=False)],
    ids=["sinespe", "fstripe"],
)
def test_one_stage_expectation(make):
    """The mean over draws is exp(sum_d q_d k_d C_d / sqrt(D)), within 5 sigma."""
    encoding = make().double()
    q, k = 0.8 * torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)
    at_q, at_k = torch.tensor(3.0), torch.tensor(1.5)
    maps = encoding.position_maps()
    kernels = []
    for seed in range(1000):
        psi = Favor(8, seed=seed)
        features = []
        for x, position, position_map in ((q, at_q, maps[0]), (k, at_k, maps[1])):
            exponent, half = psi.exponents(x, position.double().view(1, 1, 1), position_map)
            features.append((exponent - half).exp() / 8**0.5)
        kernels.append((features[0] * features[1]).sum().detach())
    kernels = torch.stack(kernels)
    c = encoding.kernel(at_q, at_k)[0]
    wanted = torch.exp(q.flatten() @ c @ k.flatten() / 2)
    assert abs(kernels.mean() - wanted) < 5 * kernels.std() / len(kernels) ** 0.5
    assert kernels.std() > 0.01 * wanted


# when it is redrawn


def _layer(backend="reference", **options):
    torch.manual_seed(5)
    encoding = SineSPE(4, 2, num_sines=2, num_realizations=8, seed=1, **options)
    psi = Favor(12, seed=2, **options)
    return CausalLinearAttention(8, 2, pos_encoding=encoding, feature_map=psi, backend=backend)


def test_redraw_policy():
    x = torch.randn(2, 5, 8)

    def keys(layer, n):
        return [layer(x) is None or layer.feature_map.noise_key[1].item() for _ in range(n)]

    assert len(set(keys(_layer(), 6))) == 6
    every = keys(_layer(resample=3), 9)
    assert len(set(every)) in (3, 4)
    assert max(every.count(key) for key in every) == 3
    assert len(set(keys(_layer(resample="never"), 4))) == 1
    layer = _layer()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    resumed = _layer()
    resumed.feature_map.resample_()
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(layer.train()(x), resumed(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_with_the_same_noise(backend, reentrant):
    """Gradients to the bit, over steps, with the noise of the encoding and of the map."""

    def train(layers, run):
        torch.manual_seed(8)
        out = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = leaf
            for layer in layers:
                y = y + run(layer, y)
            layers.zero_grad()
            y.square().sum().backward()
            out += [y.detach(), leaf.grad, *(p.grad.clone() for p in layers.parameters())]
        return out

    layers = torch.nn.ModuleList(_layer(backend) for _ in range(2))
    again, x = copy.deepcopy(layers), torch.randn(2, 7, 8)
    plain = train(layers, lambda layer, y: layer(y))
    saved = train(again, lambda layer, y: checkpoint(layer, y, use_reentrant=reentrant))
    for actual, expected in zip(saved, plain, strict=True):
        assert torch.equal(actual, expected)


def test_state_belongs_to_its_noise():
    """That of the encoding and that of the map."""
    x = torch.randn(1, 4, 8)
    for part in ("pos_encoding", "feature_map"):
        layer = _layer()
        _, state = layer(x, output_final_state=True)
        assert state.noise.tolist() == [1, 1, 2, 1]
        layer.step(x[:, 0], state)
        getattr(layer, part).resample_()
        with pytest.raises(ValueError, match=r"another .* of noise"):
            layer.step(x[:, 0], state)


def test_state_without_its_references_is_refused():
    q, k, v = make_inputs(B, 4, H, D, E)
    psi = Favor()
    _, state = _attend(psi, q, k, v, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.c must be of shape \(2, 3, 16\)"):
        _attend(psi, q, k, v, initial_state=state._replace(c=None))


@traced
def test_compiled(compiled):
    """One graph, noise and stabiliser in it."""
    layer, x = _layer(), torch.randn(2, 9, 8)
    twin = copy.deepcopy(layer)
    run = compiled(layer)
    for _ in range(2):
        assert_within(run(x), twin(x), 1e-5)
    assert layer.feature_map.step == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    """Logarithms and sums in float32; the output is rounded once."""
    q, k, v = make_inputs(B, T, H, D, E, dtype)
    psi = Favor(14, seed=3)
    o, state = _attend(psi, q, k, v, output_final_state=True, backend=backend)
    assert (o.dtype, state.s.dtype, state.c.dtype) == (dtype, torch.float32, torch.float32)
    wanted = _expected(psi, None, q.double(), k.double(), v.double(), None)
    assert_within(o, wanted, torch.finfo(dtype).eps + 1e-4)
