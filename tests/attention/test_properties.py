"""Any shape, any strides: hypothesis draws them, the oracle decides."""

import itertools

import pytest
import torch
from calls import BY_NAME, calls
from helpers import Problem, assert_close, assert_within, make_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpe import causal_linear_attention

# the same examples every time; the fixture of a backend is the same for all of them
fixed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def problems(draw):
    name = draw(st.sampled_from(sorted(BY_NAME)))
    h, d = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    if "rope" in name:
        d += d % 2
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 40)), h
    # half precision has tests of its own: here cancelling gradients have no bound known beforehand
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    feature_map = draw(st.sampled_from(["elu1", "relu", "exp", "identity"]))
    # without a state the normalised output of the first token is its value, whatever q: a gradient
    # of zero, of which rounding leaves some digits; and weights of both signs may add up to zero
    state = draw(st.booleans())
    return Problem(
        BY_NAME[name](d, h),
        dtype,
        shape=shape,
        d=d,
        e=draw(st.integers(1, 24)),
        state=state,
        feature_map=feature_map,
        normalize=state and d > 2 and feature_map in ("elu1", "relu") and draw(st.booleans()),
    )


@fixed
@given(case=problems(), chunk_size=st.none() | st.integers(1, 50))
def test_any_problem(backend, case, chunk_size):
    case.check(case.run(backend, chunk_size=chunk_size))


@fixed
@given(case=calls(), chunk_size=st.none() | st.integers(1, 20))
def test_any_arguments(backend, case, chunk_size):
    """Packed, padded, aligned, heads that share, any feature map: every query by its own keys."""
    actual, exact = case.run(backend, chunk_size=chunk_size), case.compute()
    # in float64 too, for gradients that cancel: of frequencies, where a sequence is one token
    plain = [case.compute(case.dtype)]
    plain += [case.compute(rounding=(case.dtype, seed)) for seed in range(3)]
    # of no sequence there is no state to compare
    actual = {name: x for name, x in actual.items() if name in exact}
    assert_close(actual, exact, plain, case.dtype)


@st.composite
def strided(draw, shape, dtype):
    """A view of a shape [B, T, H, D] somewhere in a larger tensor, in any order of dimensions."""
    order = draw(st.permutations(range(4)))
    steps = [draw(st.integers(1, 3)) for _ in range(4)]
    starts = [draw(st.integers(0, 2)) for _ in range(4)]
    spread = [draw(st.booleans()) and draw(st.booleans()) for _ in range(4)]
    sizes = [
        1 if wide else start + step * n
        for n, step, start, wide in zip(shape, steps, starts, spread, strict=True)
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    x = torch.randn([sizes[i] for i in order], generator=generator, dtype=dtype)
    x = x.permute([order.index(i) for i in range(4)])
    for i, (n, step, start, wide) in enumerate(zip(shape, steps, starts, spread, strict=True)):
        x = (
            x.expand([n if j == i else -1 for j in range(4)])
            if wide
            else x.narrow(i, start, x.shape[i] - start)[
                (slice(None),) * i + (slice(0, None, step),)
            ]
        )
    assert x.shape == shape
    return x


@fixed
@given(data=st.data())
def test_any_strides(backend, data):
    b, t, h = (data.draw(st.integers(1, 4)) for _ in range(3))
    d, e = 2 * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 18))
    name = data.draw(st.sampled_from(["none", "rope", "rope-half", "ropepool", "sinespe"]))
    encoding = BY_NAME[name](d, h)
    dtype = torch.float64 if backend == "reference" else torch.float32
    if encoding is not None:
        encoding.to(dtype)
    shapes = (b, t, h, d), (b, t, h, d), (b, t, h, e), (b, t, h, e)
    *views, weight = (data.draw(strided(torch.Size(s), dtype)) for s in shapes)
    # with a small eps the gradient of a first token's weight is a difference of equal numbers
    options = {"pos_encoding": encoding, "eps": 1.0, "backend": backend}

    def run(tensors, weight):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = causal_linear_attention(*leaves, **options)
        return [o, *torch.autograd.grad(o, leaves, weight)]

    expected = run([x.contiguous() for x in views], weight.contiguous())
    for actual, wanted in zip(run(views, weight), expected, strict=True):
        if backend == "reference":
            assert_within(actual, wanted, 1e-9)
        else:
            assert torch.equal(actual, wanted)


@fixed
@given(
    cuts=st.lists(st.integers(0, 30), max_size=5),
    name=st.sampled_from([n for n in BY_NAME if "vector" not in n]),
    chunk_size=st.none() | st.integers(1, 20),
)
def test_any_split(backend, cuts, name, chunk_size):
    encoding = BY_NAME[name](6, 2)
    if encoding is not None:
        encoding.double()
    q, k, v = make_inputs(1, 30, 2, 6, 5)
    options = {
        "pos_encoding": encoding,
        "output_final_state": True,
        "backend": backend,
        "chunk_size": chunk_size,
    }
    whole, end = causal_linear_attention(q, k, v, **options)
    parts, state = [], None
    edges = [0, *sorted(cuts), 30]
    for start, stop in itertools.pairwise(edges):
        o, state = causal_linear_attention(
            *(x[:, start:stop] for x in (q, k, v)), initial_state=state, **options
        )
        parts.append(o)
    assert_within(torch.cat(parts, 1), whole, 1e-11)
    assert_within(state.s, end.s, 1e-11, "s")


@fixed
@given(data=st.data())
def test_any_bad_shape_is_refused(data):
    """Shapes that do not fit raise ValueError, whatever they are, before a kernel runs."""
    sizes = st.integers(1, 3)
    shapes = [tuple(data.draw(sizes) for _ in range(data.draw(st.integers(3, 5)))) for _ in "qkv"]
    q, k, v = (torch.zeros(s) for s in shapes)
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    if fits:
        assert causal_linear_attention(q, k, v, backend="reference").shape == v.shape
    else:
        with pytest.raises(ValueError, match="must"):
            causal_linear_attention(q, k, v, backend="reference")
