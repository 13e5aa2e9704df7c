"""What docs/numerics.md promises: any length, small exponentials, NaN, bits that stay."""

import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs

import fastpe
from fastpe import RoPE, causal_linear_attention, causal_linear_attention_step
from fastpe.backends import native

# tokens before a NaN that it reaches through a product with a weight of zero
_REACH = {"cpu": 0, "cuda-host": 15, "reference": 63}


def _path(backend):
    return "cuda-host" if backend == "cpu" and native.libraries["cpu"].on_gpu else backend


# any length


def _constant(length, dtype):
    q = torch.zeros(1, length, 1, 4, dtype=dtype)
    return q, torch.full_like(q, 0.1), torch.ones_like(q)


def _check_constant(backend, length):
    """Equal keys and values: o is 1, s and z are T times what one token adds."""
    q, k, v = _constant(length, torch.float32)
    o, (s, z, *_) = causal_linear_attention(q, k, v, output_final_state=True, backend=backend)
    psi = (1 + k[0, 0, 0].double()) * length
    assert_within(o, v.double(), 2e-5, "o")
    assert_within(z[0, 0], psi, 1e-6, "z")
    assert_within(s[0, 0], psi[:, None].expand(4, 4), 1e-6, "s")


def _check_repeats(backend, length, encoding):
    """Sixteen tokens over and over: outputs, state and gradients."""

    def run(dtype, backend):
        drawn = make_inputs(1, 16, 1, 4, 4, torch.float32) + make_inputs(1, 16, 1, 4, 4, seed=1)[:1]
        q, k, v, grad = (x.to(dtype).repeat(1, length // 16, 1, 1) for x in drawn)
        leaves = [leaf(x) for x in (q, k, v)]
        o, state = causal_linear_attention(
            *leaves, pos_encoding=encoding, output_final_state=True, backend=backend
        )
        grads = torch.autograd.grad(o, leaves, grad.to(dtype))
        return dict(zip(("o", "s", "z", "dq", "dk", "dv"), (o, *state[:2], *grads), strict=True))

    exact = run(torch.float64, "reference")
    for name, x in run(torch.float32, backend).items():
        assert_within(x, exact[name], 2e-5, name)


def test_equal_keys_at_any_length(backend):
    """T4: each chunk is added as a whole, and what that rounds off is kept."""
    _check_constant(backend, 100_000)


@pytest.mark.parametrize("make", encodings("none", "rope"))
def test_repeated_keys_at_any_length(backend, make):
    _check_repeats(backend, 100_000, make(4, 1))


# a step at a time


def _check_steps(backend, tokens, encoding, count):
    """Decode tokens over and over, `count` in all: the state, and the last output."""

    def run(dtype, chosen):
        # RoPE's weights may have either sign
        options = {"pos_encoding": encoding, "normalize": encoding is None, "backend": chosen}
        q, k, v = (x.to(dtype) for x in tokens)
        first = [x[:, :1] for x in (q, k, v)]
        with torch.no_grad():
            if chosen == "reference":
                whole = (x.repeat(1, count // x.shape[1] + 1, 1, 1)[:, :count] for x in (q, k, v))
                o, state = causal_linear_attention(*whole, output_final_state=True, **options)
                return o[:, -1], state
            _, state = causal_linear_attention(*first, output_final_state=True, **options)
            for t in range(1, count):
                i = t % q.shape[1]
                token = q[:, i], k[:, i], v[:, i]
                o, state = causal_linear_attention_step(*token, state, **options)
        return o, state

    wanted_o, wanted = run(torch.float64, "reference")
    o, state = run(torch.float32, backend)
    assert_within(o, wanted_o, 2e-5, "o")
    assert_within(state.s, wanted.s, 1e-6, "s")
    if encoding is None:
        assert_within(state.z, wanted.z, 1e-6, "z")


@pytest.fixture(params=["cpu", "cuda-host"])
def stepping(request, monkeypatch, native_kernels):
    """The backends that decode a token in one call."""
    if request.param == "cuda-host":
        monkeypatch.setitem(native.libraries, "cpu", request.getfixturevalue("cuda_host"))
    return native_kernels


@pytest.mark.parametrize("make", encodings("none", "rope"))
@pytest.mark.parametrize("repeats", [1, 16])
def test_steps_keep_their_digits(stepping, make, repeats):
    """What rounding takes from the sums goes on with the state."""
    tokens = _constant(1, torch.float32)
    if repeats > 1:
        tokens = make_inputs(1, repeats, 1, 4, 4, torch.float32)
    _check_steps(stepping, tokens, make(4, 1), 6_000)


@pytest.mark.slow
def test_a_hundred_thousand_steps(native_kernels):
    _check_steps(native_kernels, _constant(1, torch.float32), None, 100_000)


def test_what_rounding_took_belongs_to_a_state(native_kernels):
    q, k, v = make_inputs(2, 3, 2, 4, 5, torch.float32)
    with torch.no_grad():
        first = (x[:, :2] for x in (q, k, v))
        _, state = causal_linear_attention(*first, output_final_state=True)
        assert state.lost is None
        token = [x[:, 2] for x in (q, k, v)]
        _, after = causal_linear_attention_step(*token, state)
        assert after.lost.shape == (2, 2, 4 * 5 + 4)
        with pytest.raises(ValueError, match=r"initial_state\.lost must be of shape \(2, 2, 24\)"):
            causal_linear_attention_step(*token, after._replace(lost=after.lost[..., 1:]))
        # several tokens, another backend and gradients go on without it
        more = causal_linear_attention(q, k, v, initial_state=after, output_final_state=True)[1]
        assert more.lost is None
        for backend in ("auto", "reference"):
            causal_linear_attention_step(*token, after, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    _, state = causal_linear_attention(*wide, output_final_state=True)
    _, state = causal_linear_attention_step(*(x[:, 2] for x in wide), state)
    assert state.lost is None  # float64 has the digits
    leaves = [leaf(x) for x in token]
    o, _ = causal_linear_attention_step(*leaves, after)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.slow
def test_a_million_equal_keys(backend):
    _check_constant(backend, 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("make", encodings("none", "rope"))
def test_a_million_repeated_keys(backend, make):
    _check_repeats(backend, 1_000_000, make(4, 1))


def test_gradients_from_behind_at_any_length(backend):
    """The state that runs backwards: keys at the front hear of every later query alike."""
    _, q, v = _constant(100_000, torch.float32)

    def run(dtype, backend):
        leaves = [leaf(x, dtype) for x in (q, q, v)]
        o = causal_linear_attention(*leaves, normalize=False, backend=backend)
        return torch.autograd.grad(o.sum(), leaves)

    found, exact = run(torch.float32, backend), run(torch.float64, "reference")
    for name, x, wanted in zip(("dq", "dk", "dv"), found, exact, strict=True):
        assert_within(x, wanted, 2e-5, name)


# small exponentials


@pytest.mark.parametrize("feature_map", ["exp", "elu1"])
def test_exponentials_reach_zero(backend, feature_map):
    """Through float32's denormals, to the last of them."""
    x = torch.cat((torch.linspace(-110, -0.01, 4000), torch.tensor([-104.0, -torch.inf])))
    k = x[:, None, None, None]
    _, state = causal_linear_attention(
        *(torch.zeros_like(k), k, torch.ones_like(k)),
        feature_map=feature_map,
        normalize=False,
        output_final_state=True,
        backend=backend,
    )
    exact = x.double().exp()
    off = (state.s.flatten().double() - exact).abs()
    assert (off <= 2e-6 * exact + 2.0**-149).all()


def test_large_features_of_small_ones(backend):
    """e^88 e^-88 = 1."""
    q = torch.full((1, 1, 1, 1), 88.0)
    options = {"feature_map": "exp", "normalize": False, "backend": backend}
    o = causal_linear_attention(q, -q, torch.ones_like(q), **options)
    assert_within(o, torch.ones_like(o).double(), 1e-5)


# NaN and infinity


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", encodings("none", "rope"))
def test_nan_in_a_value_reaches_no_earlier_chunk(backend, make, bad):
    """Nor an earlier output at all where docs/numerics.md says so."""
    q, k, v = make_inputs(1, 150, 2, 8, 6, torch.float32)
    options = {"pos_encoding": make(8, 2), "backend": backend}
    clean = causal_linear_attention(q, k, v, **options)
    for t in (3, 70, 77, 149):
        wrong = v.clone()
        wrong[0, t, 0, 2] = bad
        o = causal_linear_attention(q, k, wrong, **options)
        before = max(t - _REACH[_path(backend)], 0)
        assert torch.equal(o[:, :before], clean[:, :before])
        assert torch.equal(o[:, :, 1], clean[:, :, 1])
        assert not o[0, t, 0, 2].isfinite()


# gradients far from position 0


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradient_of_frequencies_far_out(kernels, packed):
    """Only differences of positions count: d theta is as good at 10^6 as at 0."""
    q, k, v = make_inputs(1, 40, 1, 8, 6)
    grad = make_inputs(1, 40, 1, 8, 6, seed=1)[2]
    bounds = {"cu_seqlens": torch.tensor([0, 15, 40])} if packed else {}

    def run(dtype, backend):
        encoding = RoPE(8, learned=True).to(dtype)
        o = causal_linear_attention(
            *(x.to(dtype) for x in (q, k, v)),
            pos_encoding=encoding,
            positions=10**6 + torch.arange(40),
            backend=backend,
            **bounds,
        )
        return torch.autograd.grad(o, encoding.theta, grad.to(dtype))[0]

    assert_within(run(torch.float32, kernels), run(torch.float64, "reference"), 1e-5)


@pytest.mark.parametrize("given", ["s", "ds"])
def test_gradient_of_frequencies_with_a_state(kernels, given):
    """A state was rotated by absolute positions: these count."""
    q, k, v = make_inputs(1, 40, 1, 8, 6)
    s, z = torch.randn(1, 1, 8, 6).double(), torch.rand(1, 1, 8).double()

    def run(backend):
        encoding = RoPE(8, learned=True).double()
        state = None
        if given == "s":
            _, state = causal_linear_attention(
                *(x[:, :0] for x in (q, k, v)), pos_encoding=encoding, output_final_state=True
            )
            state = state._replace(s=s, z=z)
        o, end = causal_linear_attention(
            *(q, k, v),
            pos_encoding=encoding,
            positions=1000 + torch.arange(40),
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        loss = o.sin().sum() + (end.s.sin().sum() if given == "ds" else 0)
        return torch.autograd.grad(loss, encoding.theta)[0]

    assert_within(run(kernels), run("reference"), 1e-9)


# the table of determinism


def _run(q, k, v, **options):
    leaves = [leaf(x) for x in (q, k, v)]
    o = causal_linear_attention(*leaves, **options)
    return [o, *torch.autograd.grad(o.sin().sum(), leaves)]


@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "rope-before"))
def test_a_row_alone_has_the_bits_it_has_in_a_batch(kernels, make):
    inputs = make_inputs(3, 75, 2, 8, 6, torch.float32)
    options = {"pos_encoding": make(8, 2), "backend": kernels}
    together, alone = _run(*inputs, **options), _run(*(x[1:2] for x in inputs), **options)
    for x, y in zip(together, alone, strict=True):
        assert torch.equal(x[1:2], y)


@pytest.mark.parametrize("length", [1, 2, 33, 66])
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "rope-before"))
def test_a_prefix_has_the_bits_of_the_whole(kernels, make, length):
    inputs = make_inputs(2, 75, 2, 8, 6, torch.float32)
    options = {"pos_encoding": make(8, 2), "backend": kernels}
    whole = causal_linear_attention(*inputs, **options)
    prefix = causal_linear_attention(*(x[:, :length] for x in inputs), **options)
    assert torch.equal(prefix, whole[:, :length])


@pytest.mark.parametrize("make", encodings("rope", "ropepool", "sinespe", "fstripe-pooled"))
def test_a_later_position_moves_no_output(kernels, make):
    """Not a bit of it where pairs rotate; sines of neighbours are made together."""
    inputs = make_inputs(2, 75, 2, 8, 6, torch.float32)
    encoding, positions = make(8, 2), torch.arange(75.0)
    moved = torch.where(positions > 40, 2.5 * positions, positions)

    def run(positions):
        return causal_linear_attention(
            *inputs, pos_encoding=encoding, positions=positions, backend=kernels
        )[:, :41]

    before, after = run(positions), run(moved)
    if isinstance(encoding, (RoPE, fastpe.RoPEPool)):
        assert torch.equal(before, after)
    assert_within(after, before, 1e-5)


@pytest.mark.parametrize("make", encodings("sinespe", "fstripe-pooled", "fstripe-unpooled"))
def test_sines_of_a_row_and_a_prefix_are_the_same_to_rounding(kernels, make):
    inputs = make_inputs(3, 75, 2, 8, 6, torch.float32)
    options = {"pos_encoding": make(8, 2), "backend": kernels}
    whole = causal_linear_attention(*inputs, **options)
    for row, length in ((1, 75), (2, 34)):
        part = (x[row : row + 1, :length] for x in inputs)
        assert_within(causal_linear_attention(*part, **options), whole[row, :length][None], 1e-5)


# maps at the edge


def test_relu_has_no_slope_at_zero(backend):
    """As torch.relu: at 0 and -0 a query and a key have no gradient."""
    q, k, v = make_inputs(1, 20, 2, 8, 6)
    q[0, 3:9, 0, 2:6], k[0, 4:12, 1, 1:5] = 0.0, -0.0
    options = {"feature_map": "relu", "backend": backend}
    _, dq, dk, _ = _run(q, k, v, **options)
    assert not dq[q == 0].any()
    assert not dk[k == 0].any()
    assert dq[q > 0].all()


@pytest.mark.parametrize("make", encodings("sinespe", "sinespe-exact", "fstripe-pooled"))
def test_sines_beyond_24_bits(kernels, make):
    """Positions stay float64 until their turns are taken off, in the gradient too."""
    encoding = make(8, 1).double()
    q, k, v = make_inputs(1, 40, 1, 8, 6)
    positions = 2**26 + 1 + torch.arange(40)

    def run(backend):
        leaves = [leaf(x) for x in (q, k, v)] + list(encoding.parameters())
        o = causal_linear_attention(
            *leaves[:3], pos_encoding=encoding, positions=positions, backend=backend
        )
        return [o, *torch.autograd.grad(o.sin().sum(), leaves, allow_unused=True)]

    exact = run("reference")
    for x, wanted in zip(run(kernels), exact, strict=True):
        assert (x is None) == (wanted is None)
        if x is not None:
            assert_within(x, wanted, 1e-6)


@pytest.mark.parametrize("odd", [2, 5, 12])
@pytest.mark.parametrize("make", encodings("sinespe", "fstripe-unpooled"))
def test_one_position_out_of_line(kernels, make, odd):
    """Of sixteen whose first two and last are evenly spaced."""
    encoding = make(8, 1).double()
    inputs = make_inputs(1, 16, 1, 8, 6)
    positions = 3.0 * torch.arange(16)
    positions[odd] += 1.25
    options = {"pos_encoding": encoding, "positions": positions}
    exact = causal_linear_attention(*inputs, backend="reference", **options)
    assert_within(causal_linear_attention(*inputs, backend=kernels, **options), exact, 1e-11)
