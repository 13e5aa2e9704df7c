"""The scan: widths, lengths, chunks, memory layouts, and the operators behind it."""

import math

import pytest
import torch
from conftest import encodings
from helpers import LAYOUTS, Problem, assert_within, error, leaf, make_inputs, problem

import fastpe
from fastpe import causal_linear_attention
from fastpe.ops.sine_features import SineFeatures, SineOptions

# B, T, H, D, E: odd ones, around the widths of vectors and the lengths of chunks
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 3, 8, 8),
    (1, 63, 1, 64, 64),
    (3, 65, 2, 16, 48),
    (2, 128, 3, 60, 20),
    (1, 129, 2, 33, 3),
    (1, 200, 1, 100, 1),
    (1, 97, 1, 128, 130),
    (1, 20, 1, 256, 31),
    (5, 3, 3, 4, 12),
]


def _make_none(head_dim, num_heads):
    return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("b", "t", "h", "d", "e"), SHAPES)
def test_shapes(backend, b, t, h, d, e, dtype):
    # of one feature the normaliser leaves a mean that does not depend on q at all
    case = problem(_make_none, dtype, shape=(b, t, h), d=d, e=e, normalize=d > 1)
    case.check(case.run(backend))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 8, 15, 16, 17, 32, 63, 64, 65, 128, 10**9])
@pytest.mark.parametrize("normalize", [True, False, "abs"])
def test_chunk_sizes(backend, chunk_size, normalize):
    case = problem(_make_none, shape=(1, 101, 2), normalize=normalize)
    case.check(case.run(backend, chunk_size=chunk_size))


def test_long_sequence(backend):
    """Thousands of tokens, against the reference in float64."""
    q, k, v = make_inputs(1, 3001, 2, 16, 12, torch.float32)
    exact = causal_linear_attention(q.double(), k.double(), v.double(), backend="reference")
    o = causal_linear_attention(q, k, v, backend=backend)
    assert_within(o, exact, 2e-5)


def test_steps_of_half_precision_do_not_stall(backend):
    """A key sum in bfloat16 would stop growing at 256 equal increments (docs/math.md)."""
    one = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    state = None
    for t in range(600):
        options = {"normalize": False, "feature_map": "identity", "backend": backend}
        if state is None:
            _, state = causal_linear_attention(
                *(one[:, None],) * 3, output_final_state=True, **options
            )
        else:
            _, state = fastpe.causal_linear_attention_step(one, one, one, state, **options)
        assert state.s[0, 0, 0, 0] == t + 1


def _alias(x):
    """A view whose memory holds -x: the negative bit is set."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "make", encodings("none", "rope", "rope-half", "sinespe", "fstripe-pooled")
)
def test_layouts(backend, make, layout):
    """Whatever the strides, the numbers are those of contiguous tensors, gradients included."""
    case = problem(make, torch.float32, shape=(2, 21, 3))
    view = LAYOUTS[layout](case.q)
    assert torch.equal(view, case.q)
    expected = case.run(backend)
    for name, x in case.run(backend, layout=LAYOUTS[layout]).items():
        if backend == "reference":
            assert_within(x, expected[name], 1e-5, name)
        else:
            assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("feature_map", ["elu1", "relu", "exp"])
def test_infinite_inputs(backend, feature_map):
    """psi(-inf) is psi's limit."""
    q, k, v = make_inputs(1, 5, 2, 4, 4, torch.float32)
    low = torch.full_like(q, -math.inf)
    options = {"feature_map": feature_map, "normalize": False, "backend": backend}
    o = causal_linear_attention(low, k, v, **options)
    assert_within(o, causal_linear_attention(torch.full_like(q, -1e3), k, v, **options), 1e-30)


def test_negative_views(backend):
    q, k, v = make_inputs(2, 9, 2, 8, 6, torch.float32)
    expected = causal_linear_attention(q, k, v, backend=backend)
    views = [_alias(x) for x in (q, k, v)]
    assert all(x.is_neg() for x in views)
    assert torch.equal(causal_linear_attention(*views, backend=backend), expected)


@pytest.mark.parametrize(
    "make", encodings("sinespe", "fstripe-pooled", "fstripe-unpooled", "ropepool")
)
def test_parameters_in_any_layout(kernels, make):
    """Their gradients are the same wherever in memory their entries lie."""
    case = Problem(make(8, 2))
    expected = case.run(kernels)
    for p in case.encoding.parameters():
        p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)
    for name, x in case.run(kernels).items():
        assert_within(x, expected[name], 1e-13, name)


@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_expanded_inputs(backend, make):
    """Stride 0 over the batch, the heads and in the gradient of the output."""
    encoding = make(8, 3)
    small = make_inputs(1, 11, 1, 8, 6, torch.float32)

    def run(spread):
        leaves = [leaf(x) for x in small]
        o = causal_linear_attention(
            *(spread(x) for x in leaves), pos_encoding=encoding, backend=backend
        )
        o.sum().backward()
        return [o, *(x.grad for x in leaves)]

    expanded = run(lambda x: x.expand(2, -1, 3, -1))
    for actual, expected in zip(expanded, run(lambda x: x.repeat(2, 1, 3, 1)), strict=True):
        assert_within(actual, expected, 1e-6)


@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe", "custom"))
def test_gradient_of_the_state_alone(backend, make):
    """Neither the output nor one half of the state need take part in the loss."""
    for chosen in ("o", "s", "z"):
        case = problem(make, shape=(1, 12, 2))

        def only(outputs, leaves, chosen=chosen):
            loss = outputs[chosen].square().sum()
            used = [x for x in leaves.values() if x.requires_grad]
            grads = torch.autograd.grad(loss, used, allow_unused=True)
            return [
                torch.zeros_like(x) if g is None else g for x, g in zip(used, grads, strict=True)
            ]

        actual = case.run(backend, derive=only)
        expected = case.compute(derive=only)
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            assert_within(x, y, 1e-11, chosen)


def test_offsets_beyond_32_bits(backend):
    """Tokens that lie 2^31 and more elements apart."""
    far = 2**31 + 5
    try:
        memory = torch.empty(2 * far + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not enough address space for 8 GiB")
    q, k, v = make_inputs(1, 3, 1, 8, 8, torch.bfloat16)
    views = []
    for i, x in enumerate((q, k, v)):
        view = memory.as_strided((1, 3, 1, 8), (1, far, 1, 1), 16 * i)
        view.copy_(x)
        views.append(view)
    if backend == "reference":
        views = [x.clone() for x in views]
    o = causal_linear_attention(*views, backend=backend)
    assert torch.equal(o, causal_linear_attention(q, k, v, backend=backend))


def test_many_heads_many_times(kernels, threads):
    """No race: the same bits 50 times over, with B H = 240."""
    threads(2)
    case = Problem(None, torch.float32, shape=(15, 20, 16), e=8)
    first = case.run(kernels)
    for _ in range(50):
        for name, x in case.run(kernels).items():
            assert torch.equal(x, first[name]), name


def test_batches_and_heads_do_not_mix(backend, make_encoding):
    """NaN in one sequence and head stays there, forward and backward."""
    encoding = make_encoding(8, 3)
    q, k, v = (leaf(x) for x in make_inputs(3, 20, 3, 8, 6, torch.float32))
    positions = None
    if encoding is not None and encoding.num_levels > 1:
        positions = torch.rand(20, 3)
    with torch.no_grad():
        k[1, 4, 2] = torch.nan
    o = causal_linear_attention(
        q, k, v, pos_encoding=encoding, positions=positions, backend=backend
    )
    o.sum().backward()
    for x in (o, q.grad, k.grad, v.grad):
        wrong = ~x.isfinite()
        assert wrong[1, :, 2].any()
        wrong[1, :, 2] = False
        assert not wrong.any()


@pytest.mark.parametrize("make", encodings("rope", "rope-half", "ropepool", "rope-learned"))
def test_split_denominator(kernels, make):
    """T10: the sum of weights is that of the features which are not rotated."""
    case = problem(make, shape=(2, 23, 2), state=False)
    rotation = case.encoding.make_maps()[0]
    o, den, s, z = torch.ops.fastpe.causal_dot(
        *(case.q, case.k, case.v, None, None, case.positions, rotation.freq, None),
        *("elu1", "sum", 1e-6, rotation.interleaved, rotation.pool, True, rotation.scale),
        *(0, kernels),
    )
    psi = [torch.where(x > 0, x + 1, x.exp()) for x in (case.q, case.k)]
    expected = torch.einsum("bthd,bthd->bht", psi[0], psi[1].cumsum(1))
    assert_within(den, expected, 1e-12)
    assert_within(z, psi[1].sum(1), 1e-12)
    assert_within(o, case.expected()["o"], 1e-11)
    assert_within(s, case.expected()["s"], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "make", [p for p in encodings("-") if p.id.startswith(("sinespe", "fstripe"))]
)
def test_grouped_by_unique_position(kernels, make, dtype):
    """T14: codes made once for each distinct position give the same, gradients included."""
    case = problem(make, dtype, shape=(2, 60, 2))
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (2, 60, case.levels), generator=generator).double()

    def run(group):
        x, positions = leaf(case.q), leaf(labels)
        sines = case.encoding.make_maps()[0]
        tensors = [None if i is None or not i.requires_grad else i for i in sines[:4]]
        y = SineFeatures.apply(x, positions, *sines[:5], SineOptions(sines[5], group, kernels))
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
        used = [x, positions, *(i for i in tensors if i is not None)]
        return [y, *torch.autograd.grad((y * weight).sum(), used)]

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    grouped = run(True)
    for i, (actual, expected) in enumerate(zip(grouped, run(False), strict=True)):
        assert_within(actual, expected, tolerance, f"result {i}")
    # tokens of one label that change places change their codes with them
    order = labels[:, :, 0].argsort(dim=1, stable=True)
    sines = case.encoding.make_maps()[0]
    y = [
        SineFeatures.apply(
            case.q.gather(1, order[:, :, None, None].expand_as(case.q)),
            labels.gather(1, order[:, :, None].expand_as(labels)),
            *(*sines[:5], SineOptions(sines.pool, group, kernels)),
        )
        for group in (True, False)
    ]
    wanted = grouped[0].gather(1, order[:, :, None, None].expand_as(grouped[0]))
    for actual in y:
        assert_within(actual, wanted, tolerance)


def test_empty_batch_and_sequence(backend, make_encoding):
    for b, t in ((0, 5), (2, 0), (0, 0)):
        case = Problem(make_encoding(8, 2), torch.float32, shape=(b, t, 2), state=b > 0)
        actual = case.run(backend)
        assert actual["o"].shape == (b, t, 2, 6)
        assert actual["dq"].shape == case.q.shape
        if case.state is not None:
            assert torch.equal(actual["s"], case.state.s)
            assert torch.equal(actual["z"], case.state.z)
        elif b:
            assert error(actual["s"], torch.zeros_like(actual["s"])) == 0
        for name, p in case.params().items():
            assert torch.equal(actual[f"d{name}"], torch.zeros_like(p)), name


def test_dtypes_of_the_results(backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (x.transpose(0, 1) for x in make_inputs(2, 5, 3, 8, 6, dtype))
        o, state = causal_linear_attention(q, k, v, output_final_state=True, backend=backend)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (o.dtype, state.s.dtype, state.z.dtype) == (dtype, wide, wide)
