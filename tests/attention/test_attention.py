"""causal_linear_attention end to end: every encoding on every backend against the oracle."""

import pytest
import torch
from conftest import encodings
from helpers import assert_close, assert_within, error, make_inputs, make_positions, problem

import fastpe
from fastpe import causal_linear_attention, causal_linear_attention_step
from fastpe.backends import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# docs/math.md, "Tolerances", T5
T5 = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_state_and_every_gradient(backend, make_encoding, dtype):
    case = problem(make_encoding, dtype)
    case.check(case.run(backend))


@pytest.mark.parametrize(
    ("feature_map", "normalize", "eps"),
    [
        ("elu1", False, 1e-6),
        ("relu", True, 1e-3),
        ("exp", True, 0),
        ("exp", "abs", 1e-6),
        ("identity", False, 1e-6),
        ("identity", "abs", 2.0),  # clamps some of the sums
        ("relu", False, 1e-6),
    ],
)
def test_feature_maps_and_normalizers(backend, make_encoding, feature_map, normalize, eps):
    options = {"feature_map": feature_map, "normalize": normalize, "eps": eps}
    case = problem(make_encoding, shape=(2, 11, 2), **options)
    case.check(case.run(backend))


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 1000])
def test_chunk_size_changes_rounding_only(backend, make_encoding, chunk_size):
    case = problem(make_encoding, shape=(1, 37, 2))
    case.check(case.run(backend, chunk_size=chunk_size))


@pytest.mark.parametrize(("d", "e"), [(6, 1), (10, 40), (20, 10), (40, 6), (64, 17)])
def test_any_width(backend, make_encoding, d, e):
    case = problem(make_encoding, torch.float32, d=d, shape=(1, 19, 3), e=e)
    case.check(case.run(backend))


@pytest.mark.parametrize("make", [p for p in encodings("-") if "rope" not in p.id])
def test_odd_width(backend, make):
    case = problem(make, torch.float32, d=7, shape=(1, 19, 3), e=5)
    case.check(case.run(backend))


@pytest.mark.parametrize("state", [False, True], ids=["start", "resumed"])
@pytest.mark.parametrize("make", encodings("-rope-vector", "-fstripe-vector"))
def test_default_positions_count_from_the_state(backend, make, state):
    case = problem(make, positions=None, state=state)
    case.check(case.run(backend))


def _cut(x, piece):
    return None if x is None else x[:, piece]


@pytest.mark.parametrize("dtype", list(T5), ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["time", "structure"])
def test_split_and_resume(backend, make_encoding, dtype, given):
    case = problem(make_encoding, dtype, positions="structure" if given else None)
    if not given and case.levels > 1:
        pytest.skip("a vector position has no default")
    options = {"pos_encoding": case.encoding, "output_final_state": True, "backend": backend}
    tensors = case.q, case.k, case.v
    with torch.no_grad():
        whole, end = causal_linear_attention(
            *tensors, positions=case.positions, initial_state=case.state, **options
        )
        parts, state = [], case.state
        for piece in (slice(0, 1), slice(1, 17), slice(17, 17), slice(17, 36), slice(36, None)):
            o, state = causal_linear_attention(
                *(x[:, piece] for x in tensors),
                positions=_cut(case.positions, piece),
                initial_state=state,
                **options,
            )
            parts.append(o)
    assert_within(torch.cat(parts, 1), whole, T5[dtype])
    for name in ("s", "z"):
        assert_within(getattr(state, name), getattr(end, name), T5[dtype], name)
    assert state.length == end.length == case.state.length + 37


@pytest.mark.parametrize("dtype", list(T5), ids=str)
def test_steps_are_the_full_sequence(backend, make_encoding, dtype):
    case = problem(make_encoding, dtype, shape=(2, 9, 2))
    options = {"pos_encoding": case.encoding, "backend": backend}
    tensors, state = (case.q, case.k, case.v), case.state
    with torch.no_grad():
        whole, end = causal_linear_attention(
            *tensors,
            positions=case.positions,
            initial_state=state,
            output_final_state=True,
            **options,
        )
        before, parts = state.s.clone(), []
        for t in range(9):
            positions = None if case.positions is None else case.positions[:, t]
            if case.levels == 1 and positions is not None:
                positions = positions[:, 0]
            o, state = causal_linear_attention_step(
                *(x[:, t] for x in tensors), state, positions=positions, **options
            )
            parts.append(o)
    assert_within(torch.stack(parts, 1), whole, T5[dtype])
    assert_within(state.s, end.s, T5[dtype], "s")
    assert_within(state.z, end.z, T5[dtype], "z")
    assert torch.equal(case.state.s, before), "a step must not change the state it is given"


def test_gradient_through_split(backend, make_encoding):
    case = problem(make_encoding, shape=(1, 13, 2), state=False)

    def split(q, k, v, *, initial_state, positions, **options):
        o, state = [], initial_state
        for piece in (slice(0, 4), slice(4, 5), slice(5, None)):
            part, state = causal_linear_attention(
                *(x[:, piece] for x in (q, k, v)),
                positions=_cut(positions, piece),
                initial_state=state,
                **options,
            )
            o.append(part)
        return torch.cat(o, 1), state

    case.check(case.run(backend, function=split))


@pytest.mark.parametrize("normalize", [True, False])
def test_no_output_depends_on_the_future(backend, make_encoding, normalize):
    case = problem(make_encoding, shape=(2, 70, 2), normalize=normalize)

    def run(q, k, v, positions):
        return causal_linear_attention(
            *(q, k, v),
            pos_encoding=case.encoding,
            positions=positions,
            initial_state=case.state,
            normalize=normalize,
            backend=backend,
        )

    tensors = case.q, case.k, case.v, case.positions
    with torch.no_grad():
        whole = run(*tensors)
        for t in (1, 33, 69):
            changed = [None if x is None else x.clone() for x in tensors]
            for x in changed:
                if x is not None:
                    x[:, t:] = -3 * x[:, t:] + 1
            o = run(*changed)
            assert not torch.equal(o[:, t:], whole[:, t:])
            if backend == "reference":
                assert_within(o[:, :t], whole[:, :t], 1e-12)
            else:
                assert torch.equal(o[:, :t], whole[:, :t])


def test_no_gradient_comes_from_the_past(backend, make_encoding):
    case = problem(make_encoding, shape=(1, 40, 2), state=False)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    o = causal_linear_attention(
        *(q, k, v), pos_encoding=case.encoding, positions=case.positions, backend=backend
    )
    o[:, :23].square().sum().backward()
    for x in (q, k, v):
        assert x.grad[:, :23].abs().min() > 0
        assert x.grad[:, 23:].abs().max() == 0


def test_shapes_of_positions(backend, make_encoding):
    encoding = make_encoding(8, 2)
    if encoding is None:
        pytest.skip("no positions without an encoding")
    encoding.double()
    q, k, v = make_inputs(3, 12, 2, 8, 6)
    shared = make_positions(encoding, 1, 12).round()

    def run(positions):
        return causal_linear_attention(
            q, k, v, pos_encoding=encoding, positions=positions, backend=backend
        )

    whole = run(shared.expand(3, -1, -1))
    forms = [shared, shared[0], shared.float(), shared[0].long(), shared[0].to(torch.int32)]
    if encoding.num_levels == 1:
        forms += [shared[..., 0], shared[0, :, 0], shared.expand(3, -1, -1)[..., 0].short()]
    for positions in forms:
        assert_within(run(positions), whole, 1e-12)
    if encoding.num_levels == 1:
        assert torch.equal(run(None), run(torch.arange(12)))


def test_same_bits_every_time(backend, make_encoding):
    case = problem(make_encoding, torch.float32, shape=(3, 37, 2))
    first = case.run(backend)
    for _ in range(3):
        for name, x in case.run(backend).items():
            assert torch.equal(x, first[name]), name


def test_same_bits_on_any_number_of_threads(kernels, make_encoding, threads):
    """Of a call that is large enough to be shared out (csrc/cpu/kernels.cpp)."""
    case = problem(make_encoding, torch.float32, shape=(3, 150, 4), d=16, e=16)
    first = case.run(kernels)
    for n in (2, 3):
        threads(n)
        for name, x in case.run(kernels).items():
            assert torch.equal(x, first[name]), name


# rounding once at load and once at store: the arithmetic of half precision is float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "rope-before"))
def test_half_precision_is_rounded_at_the_ends_only(backend, make, dtype):
    if backend == "cuda" or native.libraries["cpu"].on_gpu:
        pytest.skip("tensor cores round operands too: test_cuda.py has what they do not round")
    case = problem(make, dtype)
    exact, plain, actual = case.expected(), case.plain(torch.float32), case.run(backend)
    states = {name: actual[name] for name in ("s", "z")}
    assert_close(states, exact, plain, torch.float32)
    o, half_ulp = exact["o"], torch.finfo(dtype).eps / 2
    arithmetic = 2 * max(error(p["o"], o) for p in plain) + 1e-7 * o.abs().max()
    assert ((actual["o"].double() - o).abs() <= half_ulp * o.abs() * 1.01 + arithmetic).all()


# wrong results of other packages (PEERS section 1)


@pytest.mark.parametrize("feature_map", ["elu1", "relu", "exp"])
def test_last_key_does_not_move_past_outputs(backend, feature_map):
    """performer-pytorch's key stabiliser is a maximum over the whole sequence."""
    q, k, v = make_inputs(2, 64, 2, 16, 16, torch.float32)
    options = {"feature_map": feature_map, "backend": backend}
    before = causal_linear_attention(q, k, v, **options)
    k[:, -1] *= 8
    after = causal_linear_attention(q, k, v, **options)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])


def test_a_token_sees_its_own_block(backend):
    """linear-attention-transformer's tokens do not see their bucket of 64: it begins with zeros."""
    q, k, v = make_inputs(2, 130, 2, 16, 16)
    o = causal_linear_attention(q, k, v, eps=0, backend=backend)
    assert_within(o[:, 0], v[:, 0], 1e-12)
    for t in (0, 1, 63, 64, 129):
        changed = v.clone()
        changed[:, t] += 1
        moved = causal_linear_attention(q, k, changed, eps=0, backend=backend) - o
        assert moved[:, t].abs().min() > 1e-4


def test_second_derivative_is_never_dropped(backend):
    """fast-transformers returns a gradient without a graph under create_graph=True."""
    q, k, v = (x.requires_grad_() for x in make_inputs(1, 9, 1, 4, 4))
    o = causal_linear_attention(q, k, v, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    assert grad.requires_grad
    if backend == "reference":
        assert torch.autograd.grad(grad.sum(), k)[0].abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(grad.sum(), k)


def test_public_names():
    assert set(fastpe.__all__) <= set(dir(fastpe))
