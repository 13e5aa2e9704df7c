"""Every GPU backend on the card itself, against float64: numbers, and what only a GPU has.

Launches, streams, graphs and the like are in test_gpu_runtime.py.
"""

import copy
import functools

import pytest
import torch
from conftest import ENCODINGS, encodings
from gpu import DEVICE, engines, gpu_only, take
from helpers import LAYOUTS, Problem, assert_close, leaf, round_

import fastpe
from fastpe import causal_linear_attention

pytestmark = gpu_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# wider features are refused by kernels that hold a state in registers
WIDEST = 256


@functools.cache
def problem(make, dtype, shape, d, e, **options):
    """Return a problem on the GPU; the oracle runs once for all backends, by matrix products."""
    # as the kernels do, float32 may add up token by token
    forms = ("matmul", "recurrent") if dtype == torch.float32 else ("matmul",)
    case = Problem(
        *(make(d, shape[2]), dtype),
        **{"shape": shape, "d": d, "e": e, "device": DEVICE},
        **{"forms": forms, "exact": "matmul", **options},
    )
    for results in [] if dtype == torch.float64 else case.plain(dtype):
        for name, x in results.items():
            # an overflow in the yardstick would allow anything
            assert x.isfinite().all(), name
    return case


def sizes(make, dtype):
    """Return T and D for an encoding: as wide as it goes, sums that float16 can hold."""
    d = next(d for d in (64, 32) if make(d, 3) is None or make(d, 3).feature_dim <= WIDEST)
    r = d if make(d, 3) is None else make(d, 3).feature_dim
    return 150 if dtype == torch.float16 and r > 128 else 333, d


@engines
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", ENCODINGS)
def test_every_encoding(engine, make, dtype):
    """Output, state and every gradient of every encoding, in the error budget of the dtype."""
    t, d = sizes(make, dtype)
    case = problem(make, dtype, (2, t, 3), d, 48)
    case.check(take(engine, lambda: case.run(engine)))


@engines
@pytest.mark.parametrize("make", ENCODINGS)
def test_float64(engine, make):
    """The same in float64, where a backend takes it."""
    case = problem(make, torch.float64, (2, 75, 2), 16, 24)
    case.check(take(engine, lambda: case.run(engine)))


# B, T, H, D, E: the widest, and widths that are no powers of two
WIDTHS = [
    (1, 200, 2, 128, 128),
    (1, 150, 2, 256, 256),
    (2, 333, 3, 80, 48),
    (1, 97, 2, 200, 17),
    (2, 130, 2, 16, 256),
    (3, 1, 2, 64, 64),
    (9, 5, 7, 24, 8),
]


@engines
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
@pytest.mark.parametrize(("b", "t", "h", "d", "e"), WIDTHS)
def test_widths(engine, make, b, t, h, d, e, dtype):
    """Head dims up to 256 and between powers of two, few tokens and many sequences."""
    case = problem(make, dtype, (b, t, h), d, e)
    case.check(take(engine, lambda: case.run(engine)))


@engines
@pytest.mark.parametrize("options", [{"normalize": False}, {"normalize": "abs"}], ids=str)
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "exp", "identity"])
@pytest.mark.parametrize("make", encodings("none", "rope"))
def test_maps_and_normalisers(engine, make, feature_map, options):
    """Every feature map and normaliser, float32."""
    case = problem(make, torch.float32, (1, 140, 2), 32, 24, feature_map=feature_map, **options)
    case.check(take(engine, lambda: case.run(engine)))


@engines
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe", "fstripe-pooled"))
def test_many_segments(engine, make, dtype):
    """Two thousand tokens that several programs share, from no state and at default positions."""
    case = problem(make, dtype, (1, 2000, 2), 64, 64, state=False, positions=None)
    case.check(take(engine, lambda: case.run(engine)))


def _published(head_dim, num_heads):
    return fastpe.SineSPE(head_dim, num_heads, num_sines=10, num_realizations=64, seed=1)


def _published_sff(head_dim, num_heads):
    return fastpe.FStripe(head_dim, num_heads, num_sines=10, num_realizations=64, seed=1)


@engines
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("make", [_published, _published_sff], ids=["sinespe", "fstripe-sff"])
def test_published_sizes(engine, make, dtype):
    """SineSPE and F-StrIPE:SFF with ten sines and 64 realisations."""
    case = problem(make, dtype, (2, 200, 2), 64, 64)
    case.check(take(engine, lambda: case.run(engine)))


# against the reference, where the oracle would need a T x T matrix


def _reference(encoding, tensors, do, rounding=None):
    """Return o, dq, dk, dv in float64; of inputs off by their last digit with (dtype, seed)."""
    leaves = {name: leaf(x, torch.float64) for name, x in zip("qkv", tensors, strict=True)}
    if rounding is not None:
        round_(leaves, *rounding)
    wide = None if encoding is None else copy.deepcopy(encoding).double()
    o = causal_linear_attention(*leaves.values(), pos_encoding=wide, backend="reference")
    grads = torch.autograd.grad(o, list(leaves.values()), do.double())
    return {"o": o.detach()} | {f"d{n}": g for n, g in zip("qkv", grads, strict=True)}


def _check(actual, encoding, tensors, do):
    dtype = tensors[0].dtype
    exact, *rounded = [
        _reference(encoding, tensors, do, r) for r in (None, *((dtype, i) for i in range(3)))
    ]
    assert_close(actual, exact, rounded, dtype)


def _random(*shape, dtype=torch.bfloat16, seed=0):
    """Return q, k, v and a gradient of o, made on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for _ in range(4)]


def _run(engine, encoding, tensors, do):
    leaves = [leaf(x) for x in tensors]
    o = causal_linear_attention(*leaves, pos_encoding=encoding, backend=engine)
    grads = torch.autograd.grad(o, leaves, do)
    return {"o": o.detach()} | {f"d{n}": g for n, g in zip("qkv", grads, strict=True)}


@engines
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe", "fstripe-sff"))
def test_long_sequence(engine, make):
    """Output and gradients of 8192 tokens in bfloat16, against the reference in float64."""
    encoding = make(64, 2)
    encoding = None if encoding is None else encoding.to(DEVICE)
    *tensors, do = _random(1, 8192, 2, 64)
    _check(take(engine, lambda: _run(engine, encoding, tensors, do)), encoding, tensors, do)


LARGE = (4, 65_600, 128, 64)


@engines
def test_more_than_two_to_the_31_numbers(engine):
    """Tensors of more than 2^31 numbers: slices of o, dq, dk, dv against float64."""
    free = torch.cuda.mem_get_info()[0]
    if free < 45e9:
        pytest.skip(f"{free / 1e9:.0f} GB are free; not checked: tensors of 2^31 numbers, 45 GB")
    *tensors, do = _random(*LARGE)
    assert do.numel() > 2**31
    encoding = fastpe.RoPE(LARGE[-1])
    # not through leaves of their own: that would be three tensors more
    for x in tensors:
        x.requires_grad_()

    def run():
        o = causal_linear_attention(*tensors, pos_encoding=encoding, backend=engine)
        return [o.detach(), *torch.autograd.grad(o, tensors, do)]

    results = take(engine, run)
    for b, h in ((0, 0), (1, 77), (3, 127)):
        part = slice(b, b + 1), slice(None), slice(h, h + 1)
        actual = {n: x[part] for n, x in zip(("o", "dq", "dk", "dv"), results, strict=True)}
        _check(actual, encoding, [x.detach()[part] for x in tensors], do[part])
    del results
    torch.cuda.empty_cache()


@engines
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("make", encodings("none", "rope-half", "sinespe"))
def test_layouts(engine, make, layout):
    """The same numbers whatever the strides of the inputs, gradients included."""
    case = problem(make, torch.float32, (2, 70, 3), 24, 16)
    expected = take(engine, lambda: case.run(engine))
    for name, x in case.run(engine, layout=LAYOUTS[layout]).items():
        assert torch.equal(x, expected[name]), name


@engines
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("make", ENCODINGS)
def test_steps_are_the_forward(engine, make, dtype):
    """A prefill and one step after another give what one forward gives, in the error budget."""
    d = sizes(make, dtype)[1] // 2
    case = problem(make, dtype, (2, 24, 3), d, 20)
    q, k, v, positions, encoding = case.q, case.k, case.v, case.positions, case.encoding
    options = {"pos_encoding": encoding, "backend": engine}

    def run():
        o, state = causal_linear_attention(
            *(x[:, :10] for x in (q, k, v)),
            positions=None if positions is None else positions[:, :10],
            initial_state=case.state,
            output_final_state=True,
            **options,
        )
        outputs = [o]
        for t in range(10, 24):
            where = None
            if positions is not None:
                where = positions[:, t] if case.levels > 1 else positions[:, t, 0]
            o, state = fastpe.causal_linear_attention_step(
                *(x[:, t] for x in (q, k, v)), state, positions=where, **options
            )
            outputs.append(o[:, None])
        return {"o": torch.cat(outputs, 1), "s": state.s, "z": state.z}

    with torch.no_grad():
        actual = take(engine, run)
    assert_close(actual, case.expected(), case.plain(dtype), dtype)
