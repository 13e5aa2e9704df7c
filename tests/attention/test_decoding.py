"""Decoding as a product: noise, many tokens, sequences at different positions, states in files."""

import io
import math

import pytest
import torch
from conftest import encodings
from helpers import assert_within, error, make_inputs, make_positions

import fastpe
from fastpe import RoPE, SineSPE, causal_linear_attention, causal_linear_attention_step

NOISY = encodings("sinespe", "sinespe-ungated", "fstripe-sff")


def _prefill(encoding, q, k, v, **options):
    options = {"backend": "reference"} | options
    return causal_linear_attention(
        q, k, v, pos_encoding=encoding, output_final_state=True, **options
    )


def _decode(encoding, inputs, state, backend, positions=None):
    """Return the outputs of one step for each token, [B, T, H, E], and the state."""
    outputs = []
    with torch.no_grad():
        for t in range(inputs[0].shape[1]):
            o, state = causal_linear_attention_step(
                *(x[:, t] for x in inputs),
                state,
                pos_encoding=encoding,
                positions=None if positions is None else positions[:, t],
                backend=backend,
            )
            outputs.append(o)
    return torch.stack(outputs, 1), state


def _squeezed(positions):
    return positions if positions is None or positions.shape[-1] > 1 else positions[..., 0]


def _same(state, other):
    for name in ("s", "z"):
        assert torch.equal(getattr(state, name), getattr(other, name)), name
    assert state.length == other.length
    assert state.config == other.config


def test_same_bits_every_time(backend, make_encoding):
    """Of two modules made alike, which draw their noise each for itself."""
    runs = []
    for _ in range(2):
        encoding = make_encoding(8, 2)
        inputs = make_inputs(2, 9, 2, 8, 6, torch.float32)
        positions = make_positions(encoding, 2, 9)
        first = None if positions is None else positions[:, :5]
        _, state = _prefill(encoding, *(x[:, :5] for x in inputs), positions=first, backend=backend)
        last = None if positions is None else _squeezed(positions[:, 5:])
        runs.append(_decode(encoding, [x[:, 5:] for x in inputs], state, backend, last))
    assert torch.equal(runs[0][0], runs[1][0])
    _same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("make", NOISY)
def test_one_noise_from_prefill_to_the_last_step(backend, make):
    """The step of a state is the noise's until it is redrawn, and then the state is refused."""
    encoding, inputs = make(8, 2), make_inputs(1, 4, 2, 8, 6, torch.float32)
    key = encoding.noise_key.clone()
    _, state = _prefill(encoding, *inputs, backend=backend)
    _, end = _decode(encoding, inputs, state, backend)
    for x in (state, end):
        assert torch.equal(x.noise, key)
    encoding.resample_()
    with pytest.raises(ValueError, match="another \\(seed, step\\) of noise"):
        _decode(encoding, inputs, end, backend)


@pytest.mark.parametrize("make", encodings("-none", "-custom"))
def test_sequences_at_different_positions(backend, make):
    """A batch decodes as each of its sequences alone."""
    encoding = make(8, 2).double()
    inputs = make_inputs(3, 6, 2, 8, 6)
    start = make_positions(encoding, 3, 1, seed=1) * torch.tensor([1, 40, -7])[:, None, None]
    positions = start + make_positions(encoding, 3, 6)
    _, state = _prefill(
        encoding, *(x[:, :2] for x in inputs), positions=positions[:, :2], backend=backend
    )
    rest = [x[:, 2:] for x in inputs]
    together, end = _decode(encoding, rest, state, backend, _squeezed(positions[:, 2:]))
    for b in range(3):
        row = slice(b, b + 1)
        alone, last = _decode(
            encoding,
            [x[row] for x in rest],
            state._replace(s=state.s[row], z=state.z[row]),
            backend,
            _squeezed(positions[row, 2:]),
        )
        assert_within(alone, together[row], 1e-12)
        assert_within(last.s, end.s[row], 1e-12, "s")
        assert_within(last.z, end.z[row], 1e-12, "z")


# features >= 0 all of them, so that sums over |v| bound the terms of sums over v
@pytest.mark.parametrize("make", encodings("none", "rope-before", "sinespe", "fstripe-pooled"))
def test_ten_thousand_steps(native_kernels, make):
    """Against one float64 pass: within 4 sqrt(T) roundings of the sum of the terms' sizes.

    Roundings of T additions grow as sqrt(T) unless they conspire (Higham and Mary, 2019).
    """
    steps, d = 10_000, 4
    encoding, inputs = make(d, 1), make_inputs(1, steps + 1, 1, d, 3, torch.float32)
    _, state = _prefill(encoding, *(x[:, :1] for x in inputs))
    o, end = _decode(encoding, [x[:, 1:] for x in inputs], state, native_kernels)
    if encoding is not None:
        encoding.double()
    q, k, v = (x.double() for x in inputs)
    exact, exact_end = _prefill(encoding, q, k, v)
    sizes, sizes_end = _prefill(encoding, q, k, v.abs())
    allowed = 4 * math.sqrt(steps) * torch.finfo(torch.float32).eps / 2
    assert ((end.s - exact_end.s).abs() <= allowed * sizes_end.s).all()
    assert ((end.z - exact_end.z).abs() <= allowed * sizes_end.z).all()
    # a quotient has the errors of both
    assert ((o - exact[:, 1:]).abs() <= 2 * allowed * sizes[:, 1:]).all()
    assert error(o, exact[:, 1:]) > 0
    assert end.length == steps + 1


# states in files


def _reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_loaded_state_goes_on_to_the_bit(backend, make_encoding):
    encoding, inputs = make_encoding(8, 2), make_inputs(2, 9, 2, 8, 6, torch.float32)
    positions = make_positions(encoding, 2, 9)
    first, last = (None, None) if positions is None else (positions[:, :5], positions[:, 5:])
    _, state = _prefill(encoding, *(x[:, :5] for x in inputs), positions=first, backend=backend)
    loaded = _reloaded(state)
    assert type(loaded) is fastpe.LinearAttentionState
    _same(loaded, state)
    rest, last = [x[:, 5:] for x in inputs], _squeezed(last) if last is not None else None
    runs = [_decode(encoding, rest, s, backend, last) for s in (state, loaded)]
    assert torch.equal(runs[0][0], runs[1][0])
    _same(runs[0][1], runs[1][1])


Q, K, V = make_inputs(2, 5, 3, 8, 6, torch.float32)
SPE = SineSPE(8, 3, seed=1)
MISMATCHES = {
    "another encoding": (
        (RoPE(8), Q, K, V),
        (None, Q, K, V),
        r"initial_state was made with no encoding, feature_map='elu1', .*; this call has RoPE\(8",
    ),
    "another base": (
        (RoPE(8), Q, K, V),
        (RoPE(8, base=500.0), Q, K, V),
        r"initial_state was made with RoPE\(8.*base=500\.0.*; this call has RoPE\(8.*base=10000\.0",
    ),
    "another seed": (
        (SPE, Q, K, V),
        (SineSPE(8, 3, seed=2), Q, K, V),
        r"initial_state was made with another \(seed, step\) of noise than pos_encoding or fea",
    ),
    "another batch": (
        (None, Q, K, V),
        (None, Q[:1], K[:1], V[:1]),
        r"initial_state\.s must be of shape \(2, 3, 8, 6\), got shape \(1, 3, 8, 6\)",
    ),
    "another value dim": (
        (None, Q, K, V),
        (None, Q, K, V[..., :4]),
        r"initial_state\.s must be of shape \(2, 3, 8, 6\), got shape \(2, 3, 8, 4\)",
    ),
    "another dtype": (
        (None, Q, K, V),
        (None, Q.double(), K.double(), V.double()),
        r"initial_state\.s must be torch\.float32 on cpu, got torch\.float64 on cpu",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_loaded_state_of_something_else_is_refused(name):
    call, saved, message = MISMATCHES[name]
    _prefill(*call, initial_state=_reloaded(_prefill(*call)[1]))
    with pytest.raises(ValueError, match=message):
        _prefill(*call, initial_state=_reloaded(_prefill(*saved)[1]))
