"""The reference backend: the specification against formulas written out, and its derivatives."""

import math

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_close, assert_within, gradients, leaf, make_inputs, problem

from fastpe import causal_linear_attention
from fastpe.backends import reference

FORMS = {
    "quadratic": reference.quadratic,
    "recurrent": reference.recurrent,
    "chunk 1": lambda *args, **options: reference.chunked(*args, chunk_size=1, **options),
    "chunk 5": lambda *args, **options: reference.chunked(*args, chunk_size=5, **options),
    "chunk 37": lambda *args, **options: reference.chunked(*args, chunk_size=37, **options),
    "chunk 64": reference.chunked,
    "chunk 1000": lambda *args, **options: reference.chunked(*args, chunk_size=1000, **options),
}


def _streams(t=37, r=5, rz=3, e=4):
    """Return features of different widths for numerator and denominator, and a state."""
    q, k, v = make_inputs(2, t, 3, r, e)
    dq, dk, _ = make_inputs(2, t, 3, rz, 1, seed=1)
    s, z, _ = make_inputs(2, 3, r, e, 1, seed=2)
    return {"q": q, "k": k, "v": v, "dq": dq.abs(), "dk": dk.abs(), "s": s, "z": z[:, :, :rz, 0]}


def _run(form, tensors, normalize, eps, with_state):
    leaves = {name: leaf(x.abs() if name == "z" else x) for name, x in tensors.items()}
    state = (leaves["s"], leaves["z"]) if with_state else None
    o, (s, z) = form(
        *(leaves[name] for name in ("q", "k", "v", "dq", "dk")),
        normalize=normalize,
        eps=eps,
        state=state,
    )
    outputs = {"o": o, "s": s, "z": z}
    return outputs | gradients(outputs, leaves)


def _direct(q, k, v, dq, dk, *, normalize, eps, state):
    s, z = state or (torch.zeros(2, 3, 5, 4).double(), torch.zeros(2, 3, 3).double())
    num, den, s, z = oracle.direct(q, k, v, dq, dk, s, z)
    return oracle.divided(num, den, normalize, eps), (s, z)


@pytest.mark.parametrize("with_state", [False, True], ids=["start", "resumed"])
@pytest.mark.parametrize(("normalize", "eps"), [(True, 1e-6), (False, 0), ("abs", 20.0)])
@pytest.mark.parametrize("form", list(FORMS))
def test_forms_agree(form, normalize, eps, with_state):
    """T4, and T10's gradients of all four streams: o, state and gradients of every form."""
    options = normalize, eps, with_state
    expected = _run(_direct, _streams(), *options)
    assert_close(_run(FORMS[form], _streams(), *options), expected)


@pytest.mark.parametrize("form", [form for form in FORMS if "00" not in form])
def test_one_token_and_none(form):
    for t in (1, 0):
        q, k, v, dq, dk, s, z = _streams(t).values()
        o, state = FORMS[form](q, k, v, dq, dk, state=(s, z.abs()))
        assert o.shape == v.shape
        if t == 0:
            assert torch.equal(state[0], s)
            assert torch.equal(state[1], z.abs())
        else:
            w = torch.einsum("bthr,bthr->bth", q, k)[..., None] * v
            num = w + torch.einsum("bthr,bhre->bthe", q, s)
            den = (dq * (dk + z.abs()[:, None])).sum(-1, keepdim=True)
            assert_within(o, num / (den + 1e-6), 1e-12)


def _wide(x):
    return torch.tensor(x, dtype=torch.float64)


def test_clamped_sum_has_no_gradient():
    num, den = torch.ones(1, 3, 1, 2).double(), _wide([[[-0.5], [0.01], [2.0]]])
    den.requires_grad_()
    o = reference.normalized(num, den, "abs", 0.1)
    assert torch.equal(o[0, :, 0, 0].detach(), _wide([2, 10, 0.5]))
    (grad,) = torch.autograd.grad(o.sum(), den)
    assert_within(grad.flatten(), _wide([2 / 0.25, 0, -2 / 4]), 1e-12)


@pytest.mark.parametrize("side", ["q", "k"])
def test_features_are_the_formulas(make_encoding, side):
    """T1: against codes written out; and in float32 with the phases in turns."""
    encoding = make_encoding(8, 3)
    if encoding is None:
        pytest.skip("nothing to encode")
    x, _, _ = make_inputs(2, 50, 3, 8, 1)
    generator = torch.Generator().manual_seed(3)
    positions = torch.randn(2, 50, encoding.num_levels, generator=generator).double() * 30
    if encoding.integer_positions:
        positions = positions.round()
    narrow = encoding.features(x.float(), positions, side)
    encoding.double()
    params = dict(encoding.named_parameters())
    expected = oracle.encode(encoding, params, x, positions, side)
    assert_within(encoding.features(x, positions, side), expected, 1e-12)
    assert_within(narrow, expected, 1e-6)


def test_phases_are_reduced_in_float64():
    positions = torch.tensor([0, 10**6 + 1, 2**40 + 3])[None, :, None]
    freq = _wide([[0.125], [1 / 3]])
    angle = reference.phases(positions, freq)
    assert angle.abs().max() <= math.pi
    assert_within(angle[0, :, 0].cos(), _wide([1, 0.5**0.5, -(0.5**0.5)]), 1e-12)
    third = [(n % 3) / 3 for n in (0, 10**6 + 1, 2**40 + 3)]
    turns = angle[0, :, 1] / (2 * math.pi)
    gap = turns - _wide(third)
    assert (gap - gap.round()).abs().max() < 2e-4  # 2^40 / 3 is held to 2^-14
    assert (gap - gap.round()).abs()[:2].max() < 1e-10


# derivatives


def _function(case, backend):
    """Return the attention of a case as a function of every tensor that has a gradient."""
    encoding = case.encoding
    names = list(case.params())
    tensors = [case.q, case.k, case.v, case.state.s, case.state.z]
    if case.positions is not None:
        tensors.append(case.positions)
    tensors += case.params().values()

    def run(q, k, v, s, z, *rest):
        positions, rest = (None, rest) if encoding is None else (rest[0], rest[1:])
        options = {"positions": positions, "backend": backend} | case.options

        class Layer(torch.nn.Module):
            def forward(self):
                o, state = causal_linear_attention(
                    *(q, k, v),
                    pos_encoding=encoding,
                    initial_state=case.state._replace(s=s, z=z),
                    output_final_state=True,
                    **options,
                )
                return o, state.s, state.z

        layer = Layer()
        layer.encoding = encoding
        given = {f"encoding.{name}": x for name, x in zip(names, rest, strict=True)}
        return torch.func.functional_call(layer, given, ())

    fixed = encoding is not None and encoding.integer_positions
    leaves = [x.detach().clone() for x in tensors]
    for x, given in zip(leaves, tensors, strict=True):
        x.requires_grad_(not (fixed and given is case.positions))
    return run, leaves


def test_gradcheck(backend, make_encoding):
    """T7, with the normaliser, of q, k, v, states, positions and every parameter."""
    case = problem(make_encoding, shape=(1, 3, 1), d=4, e=2, eps=0.5)
    run, tensors = _function(case, backend)
    assert torch.autograd.gradcheck(run, tensors, atol=1e-6, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("make", encodings("-convspe"))
def test_gradgradcheck(make):
    case = problem(make, shape=(1, 3, 1), d=4, e=2)
    run, tensors = _function(case, "reference")
    assert torch.autograd.gradgradcheck(run, tensors, atol=1e-6, rtol=1e-4, fast_mode=True)
