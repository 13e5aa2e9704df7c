"""The scan of features given by their logarithms: exact for any size, causal to the bit."""

import oracle
import pytest
import torch
from helpers import assert_within, leaf, make_inputs

from fastpe.attention.favor import _level, favor_attention
from fastpe.attention.log_scan import divided, log_scan

B, T, H, D, E = 2, 37, 3, 8, 6


@pytest.mark.parametrize("scale", [1, 50, 1e4])
def test_scan_of_logarithms(scale):
    """The denominator is at least 1; no later token changes a bit; any chunk gives the same."""
    a, b, v = make_inputs(B, T, H, D, E)
    a, b = scale * a, scale * b
    num, den, state = log_scan(a, b, v)
    assert den.min() >= 1 - 1e-15
    assert_within(divided(num, den), oracle.log_attention(a, b, v), 1e-14 * max(scale, 1))
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
    assert_within(divided(num, den), oracle.log_attention(a, b, v)[:, 20:], 1e-13 * scale)
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
    wanted = oracle.log_attention(*wide)
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
    kept = oracle.log_attention(a[:, seen], b[:, seen], v[:, seen])
    assert_within(o[:, seen], kept, 1e-13 * scale)
    grads = torch.autograd.grad(o.sin().sum(), (a, b, v))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:, :5].any() for g in grads)
    nothing = log_scan(a[:, :5], masked[:, :5], v[:, :5])[2]
    resumed = divided(*log_scan(a[:, 5:], masked[:, 5:], v[:, 5:], nothing)[:2])
    assert_within(resumed, o[:, 5:], 1e-13 * scale)
    assert_within(divided(*log_scan(a, masked, v)[:2]), o, 1e-13 * scale)
    assert state[2].isfinite().all()
