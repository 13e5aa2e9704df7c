"""The operators as torch sees them: registration, fakes, compilation; and the library's symbols."""

import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions, traced

import fastpe
from fastpe import ConvSPE, causal_linear_attention
from fastpe.backends import native
from fastpe.nn import CausalLinearAttention

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def _scan_arguments(backend, *, dtype=torch.float32, normalize="sum", rotation=None, state=True):
    q, k, v = make_inputs(2, 9, 3, 8, 6, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    r, first = (4 if rotation == "pool" else 8), rotation != "before"
    rz = 0 if normalize == "none" else 8 if first else r
    s0 = torch.randn(2, 3, r, 6, dtype=wide) if state else None
    z0 = torch.rand(2, 3, rz, dtype=wide) if state else None
    where = (None, None)
    if rotation is not None:
        freq = torch.rand(3, 4, 1, dtype=torch.float64)
        where = (torch.arange(9.0, dtype=torch.float64)[None, :, None], freq)
    options = ("elu1", normalize, 1e-6, True, rotation == "pool", first, 1.0, 0, backend)
    return (q, k, v, s0, z0, *where, None, *options)


SCANS = [
    {},
    {"dtype": torch.bfloat16, "state": False},
    {"dtype": torch.float64, "normalize": "abs", "rotation": "after"},
    {"normalize": "none", "rotation": "pool"},
    {"rotation": "before", "state": False},
]


@pytest.mark.parametrize("options", SCANS, ids=str)
def test_causal_dot(native_kernels, options):
    arguments = _scan_arguments(native_kernels, **options)
    torch.library.opcheck(torch.ops.fastpe.causal_dot.default, arguments, test_utils=TESTS)
    o, den, s, z = torch.ops.fastpe.causal_dot(*arguments)
    given = [x is not None for x in arguments[:7]]
    states = torch.randn_like(s), torch.randn_like(z)
    for grads, needs in ((states, given), ((None, None), [True] + [False] * 6)):
        torch.library.opcheck(
            torch.ops.fastpe.causal_dot_backward.default,
            (torch.randn_like(o), *grads, *arguments, o, den, needs),
            test_utils=TESTS,
        )


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(p.values[0], dtype, id=f"{p.id}-{dtype}")
        for p in encodings("-none")
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        if p.id.startswith(("sinespe", "fstripe")) and (dtype == torch.float32 or p.id == "sinespe")
    ],
)
def test_sine_features(native_kernels, make, dtype):
    encoding = make(8, 3)
    if dtype == torch.float64:
        encoding.double()
    x, _, _ = make_inputs(2, 9, 3, 8, 1, dtype)
    positions = make_positions(encoding, 2, 9)
    sines = [i.detach() if torch.is_tensor(i) else i for i in encoding.make_maps()[0]]
    arguments = (x, positions, *sines, True, native_kernels)
    torch.library.opcheck(torch.ops.fastpe.sine_features.default, arguments, test_utils=TESTS)
    y = torch.ops.fastpe.sine_features(*arguments)
    given = [i is not None for i in arguments[:6]]
    for needs in (given, [True] + [False] * 5):
        torch.library.opcheck(
            torch.ops.fastpe.sine_features_backward.default,
            (torch.randn_like(y), *arguments, needs),
            test_utils=TESTS,
        )


def test_philox_normal():
    arguments = torch.tensor(3), torch.tensor(4), 1, 0, [4, 3, 6], torch.float32
    torch.library.opcheck(torch.ops.fastpe.philox_normal.default, arguments, test_utils=TESTS)


# which noise is in use is read from buffers: FakeTensorMode alone does not allow it, torch.compile
# does without, and opcheck above has it
@pytest.mark.parametrize(
    "make", encodings("-sinespe", "-sinespe-ungated", "-fstripe-sff", "-convspe")
)
def test_fakes_agree_with_the_kernels(native_kernels, make):
    """Shapes, dtypes and strides of fake tensors: outputs, states and gradients."""
    encoding = make(8, 3)
    q, k, v = (x.transpose(0, 1) for x in make_inputs(9, 2, 3, 8, 6, torch.bfloat16))
    # integers, for which no look at their values is taken
    positions = None if encoding is None else make_positions(encoding, 2, 9).long()

    def run(mode):
        with mode:
            inputs = [leaf(x) for x in (q, k, v)]
            o, state = causal_linear_attention(
                *inputs,
                pos_encoding=encoding,
                positions=positions,
                output_final_state=True,
                backend=native_kernels,
            )
            grads = torch.autograd.grad(o.float().sum() + state.s.sum(), inputs)
        return [(x.shape, x.dtype, x.stride()) for x in (o, state.s, state.z, *grads)]

    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    real, pretended = run(torch.enable_grad()), run(fake)
    assert pretended == real


# second derivatives


def test_second_derivative_works_or_raises(backend, make_encoding):
    encoding = make_encoding(4, 1)
    if encoding is not None:
        encoding.double()
    q, k, v = (leaf(x) for x in make_inputs(1, 5, 1, 4, 3))
    positions = make_positions(encoding, 1, 5)
    convspe = isinstance(encoding, ConvSPE)  # which no backend differentiates twice
    wanted = [q, k] if convspe else [q, k, v]
    if positions is not None and not convspe:
        wanted.append(positions.requires_grad_())
    o = causal_linear_attention(
        q, k, v, pos_encoding=encoding, positions=positions, backend=backend
    )
    grads = torch.autograd.grad(o.square().sum(), wanted, create_graph=True)
    for grad in grads:
        assert grad.requires_grad, "a second derivative must not be dropped"
        if backend == "reference" and not convspe:
            second = torch.autograd.grad(grad.sum(), wanted, retain_graph=True, allow_unused=True)
            assert any(x is not None and x.abs().max() > 0 for x in second)
        else:
            with pytest.raises(RuntimeError, match="use backend='reference' for double backward"):
                torch.autograd.grad(grad.sum(), wanted, retain_graph=True)


# compilation


@pytest.fixture(params=["reference", "cpu"])
def either(request):
    """The reference, and the native backend on the code path that it picks itself."""
    if request.param == "reference":
        return "reference"
    return request.getfixturevalue("native_kernels")


@traced
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe", "fstripe-vector"))
def test_compiles_as_one_graph(either, make, compiled):
    torch.manual_seed(0)
    layer = CausalLinearAttention(12, 3, pos_encoding=make(4, 3), backend=either).eval()
    x = torch.randn(2, 9, 12)
    positions = make_positions(layer.pos_encoding, 2, 9)

    def run(module):
        given = leaf(x)
        y = module(given, positions=positions)
        grads = torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])
        return y, *grads

    for actual, expected in zip(run(compiled(layer)), run(layer), strict=True):
        assert_within(actual, expected, 1e-5)


@traced
def test_compiled_function_with_state(either, compiled):
    """Prefill and steps under torch.compile give what they give without."""
    q, k, v = make_inputs(2, 6, 2, 4, 4, torch.float32)

    def decode(q, k, v):
        encoding = fastpe.RoPE(4)
        options = {"pos_encoding": encoding, "backend": either}
        o, state = causal_linear_attention(
            q[:, :4], k[:, :4], v[:, :4], output_final_state=True, **options
        )
        last, state = fastpe.causal_linear_attention_step(
            q[:, 4], k[:, 4], v[:, 4], state, **options
        )
        return o, last, state.s

    for actual, expected in zip(compiled(decode)(q, k, v), decode(q, k, v), strict=True):
        assert_within(actual, expected, 1e-6)


@traced
def test_compiled_training_redraws_the_noise(native_kernels, compiled):
    torch.manual_seed(0)
    encoding = fastpe.SineSPE(4, 3, num_sines=2, num_realizations=8, seed=1)
    layer = CausalLinearAttention(12, 3, pos_encoding=encoding, backend=native_kernels)
    x = torch.randn(2, 9, 12)
    fast = compiled(layer)
    first, second = fast(x), fast(x)
    assert not torch.equal(first, second)
    assert encoding.step == 2
    layer.eval()
    assert_within(fast(x), layer(x), 1e-5)
    assert_within(layer(x), second, 1e-5)


@traced
def test_compiled_then_eager_training_goes_on(compiled):
    """Eager steps behind compiled ones continue the count of the noise."""
    encoding = fastpe.SineSPE(4, 3, num_sines=2, num_realizations=8, seed=1)
    layer = CausalLinearAttention(12, 3, pos_encoding=encoding, backend="reference")
    x = torch.randn(2, 5, 12)
    fast = compiled(layer)
    layer(x)
    fast(x)
    fast(x)
    layer(x)
    assert encoding.step == 4


# the library


def test_library_knows_nothing_of_torch(native_kernels):
    """A C ABI: no symbol of torch, libtorch or Python is asked for."""
    content = native.CPU.path.read_bytes()
    for name in (b"libtorch", b"libc10", b"N3c10", b"N2at", b"libpython", b"_Py_", b"PyObject"):
        assert name not in content, name
    for name in ("causal_dot", "causal_dot_backward", "sine_features", "philox_normal"):
        assert f"fastpe_{name}".encode() in content


def test_code_path_is_known(native_kernels):
    assert native.ISAS[native.CPU.functions.fastpe_best_isa()] in native.describe()
