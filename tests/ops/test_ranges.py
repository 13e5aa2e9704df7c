"""Sequences given by ranges of tokens, and heads that share keys and values, in the kernels."""

import math

import pytest
import torch
from conftest import encodings
from helpers import assert_within, compute_dtype, leaf

from fastpe.backends.specs import ScanOptions
from fastpe.ops.causal_dot import CausalDot
from fastpe.ops.sine_features import SineFeatures, SineOptions

D, E = 8, 6
# in no order, two of them empty, one as long as several chunks, gaps before, between and behind
RANGES = ((41, 62), (3, 41), (41, 41), (64, 65), (0, 0))
TOKENS = 68
# where the features are rotated, the normaliser, and how many heads q, k and v have
CASES = [
    ("none", "none", (4, 2, 2)),
    ("none", "sum", (4, 4, 1)),
    ("after", "sum", (4, 1, 2)),
    ("after", "abs", (4, 2, 2)),
    ("before", "abs", (4, 4, 1)),
    ("pool", "sum", (4, 1, 2)),
]


def make_options(rotation, normalize, backend):
    """Return the options, in chunks that a sequence of the tests has several of."""
    return ScanOptions(
        feature_map="elu1",
        normalize=normalize,
        eps=0.3,
        interleaved=True,
        pool=rotation == "pool",
        map_first=rotation != "before",
        scale=math.sqrt(0.5) if rotation == "pool" else 1.0,
        chunk=16,
        backend=backend,
    )


def make_leaves(options, rotation, heads, *, batch=1, states=None, t=TOKENS, levels=2, own=False):
    """Return random inputs by name; `own`: each head has frequencies of its own, and a state."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, of_k, of_v = heads
    sequences, shared = states or batch, h if own else max(of_k, of_v)
    r, rz = options.widths(D)
    leaves = {
        "q": normal(batch, t, h, D),
        "k": normal(batch, t, of_k, D),
        "v": normal(batch, t, of_v, E),
        "s0": normal(sequences, shared, r, E),
        "z0": normal(sequences, shared, rz).abs(),
    }
    if rotation == "none":
        return leaves | {"positions": None, "freq": None}
    where = {
        "positions": 9 * normal(batch, t, levels),
        "freq": normal(h if own else 1, D // 2, levels),
    }
    return leaves | where


def cast(leaves, dtype):
    """Return leaves in a dtype; positions and frequencies stay in float64."""
    double = "positions", "freq"
    return {
        n: leaf(x, None if n in double else compute_dtype(dtype) if n[1:] == "0" else dtype)
        for n, x in leaves.items()
    }


def differentiate(outputs, leaves, weights):
    """Return the outputs and the gradients of a linear form of them, by name ("dq", ...)."""
    used = {n: x for n, x in leaves.items() if x is not None}
    weights = [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(used.values()), weights)
    found = dict(zip(("o", "s", "z"), outputs, strict=True))
    return found | {f"d{n}": g for n, g in zip(used, grads, strict=True)}


def make_weights(leaves, seed=2):
    """Return a weight of every number of o, s and z."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (*leaves["q"].shape[:3], E), leaves["s0"].shape, leaves["z0"].shape
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def of_no_sequence(ranges, t):
    """Return which tokens no sequence has."""
    free = torch.ones(t, dtype=torch.bool)
    for first, last in ranges:
        free[first:last] = False
    return free


def check_ranges(backend, rotation, normalize, dtype, heads, **more):
    """Compare sequences in one row, NaN between them, with each sequence alone: the same bits."""
    options, free = make_options(rotation, normalize, backend), of_no_sequence(RANGES, TOKENS)
    leaves = make_leaves(options, rotation, heads, states=len(RANGES), **more)
    weights = make_weights(leaves)
    for x in (*(leaves[n] for n in ("q", "k", "v", "positions")), weights[0]):
        if x is not None:
            x[:, free] = math.nan
    packed = cast(leaves, dtype)
    outputs = CausalDot.apply(*packed.values(), torch.tensor(RANGES), options)
    found = differentiate(outputs, packed, weights)

    by_token = {"o", "dq", "dk", "dv", "dpositions"} & set(found)
    for name in by_token:
        assert not found[name][:, free].any(), name
    by_freq = 0
    for i, (first, last) in enumerate(RANGES):
        alone = {
            n: x if x is None or n == "freq" else x[i, None] if n[1:] == "0" else x[:, first:last]
            for n, x in leaves.items()
        }
        alone = cast(alone, dtype)
        outputs = CausalDot.apply(*alone.values(), None, options)
        own = weights[0][:, first:last], weights[1][i, None], weights[2][i, None]
        expected = differentiate(outputs, alone, own)
        by_freq = by_freq + expected.pop("dfreq", 0)
        for name, x in expected.items():
            of_sequence = found[name][:, first:last] if name in by_token else found[name][i, None]
            assert torch.equal(of_sequence, x), (name, i)
    if rotation != "none":
        assert_within(found["dfreq"], by_freq, 1e-12, "dfreq")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("rotation", "normalize"), [case[:2] for case in CASES])
def test_ranges_are_sequences_alone(kernels, rotation, normalize, dtype):
    check_ranges(kernels, rotation, normalize, dtype, (2, 2, 2))


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 4, 1), (4, 1, 2)], ids=str)
def test_ranges_of_heads_that_share(kernels, heads):
    check_ranges(kernels, "after", "sum", torch.float64, heads)


def test_ranges_of_heads_with_frequencies_of_their_own(kernels):
    check_ranges(kernels, "after", "sum", torch.float64, (4, 2, 1), own=True, levels=1)


def test_one_range_is_the_row(kernels):
    options = make_options("none", "sum", kernels)
    leaves = cast(make_leaves(options, "none", (2, 2, 2)), torch.float32)
    packed = CausalDot.apply(*leaves.values(), torch.tensor([[0, TOKENS]]), options)
    for x, y in zip(packed, CausalDot.apply(*leaves.values(), None, options), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("ranges", "t"), [((), 5), (((0, 0), (5, 5)), 5), (((0, 0),), 0)])
def test_no_token_is_of_a_sequence(kernels, ranges, t):
    """Outputs are zeros, and states stay."""
    options = make_options("after", "sum", kernels)
    leaves = make_leaves(options, "after", (2, 1, 1), states=len(ranges) or 1, t=t)
    leaves |= {n: leaves[n][: len(ranges)] for n in ("s0", "z0")}
    weights, leaves = make_weights(leaves), cast(leaves, torch.float64)
    where = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)
    found = differentiate(CausalDot.apply(*leaves.values(), where, options), leaves, weights)
    assert torch.equal(found["s"], leaves["s0"])
    assert torch.equal(found["z"], leaves["z0"])
    assert torch.equal(found["ds0"], weights[1])
    assert torch.equal(found["dz0"], weights[2])
    for name in ("o", "dq", "dk", "dv", "dpositions", "dfreq"):
        assert not found[name].any(), name


def check_groups(backend, rotation, normalize, heads, **more):
    """Compare with keys, values and states that are repeated for each head."""
    options, h = make_options(rotation, normalize, backend), heads[0]
    leaves = make_leaves(options, rotation, heads, batch=2, t=35, **more)
    weights, leaves = make_weights(leaves), cast(leaves, torch.float64)
    shared = CausalDot.apply(*leaves.values(), None, options)
    spread = {
        n: leaves[n].repeat_interleave(h // leaves[n].shape[dim], dim)
        for n, dim in (("k", 2), ("v", 2), ("s0", 1), ("z0", 1))
    }
    o, s, z = CausalDot.apply(*(leaves | spread).values(), None, options)
    group = h // leaves["s0"].shape[1]
    expected = differentiate((o, s[:, ::group], z[:, ::group]), leaves, weights)
    for name, x in differentiate(shared, leaves, weights).items():
        assert_within(x, expected[name], 1e-12, name)


@pytest.mark.parametrize(("rotation", "normalize", "heads"), CASES)
def test_heads_that_share(kernels, rotation, normalize, heads):
    check_groups(kernels, rotation, normalize, heads)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 4, 1)], ids=str)
def test_heads_that_share_with_frequencies_of_their_own(kernels, heads):
    check_groups(kernels, "after", "sum", heads, own=True)


@pytest.mark.parametrize("make", encodings("sinespe", "fstripe-pooled", "fstripe-unpooled"))
def test_sine_features_of_heads_that_share(kernels, make):
    sines = make(D, 4).double().make_maps()[0]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 19, 2, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 19, 1), generator=generator).double()
    tensors = [leaf(x), leaf(labels), *map(leaf, sines[:4]), sines.noise, sines.pool]

    def run(spread):
        *inputs, pool = spread(tensors[0]), *tensors[1:]
        y = SineFeatures.apply(*inputs, SineOptions(pool, True, kernels))
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
        return y, *torch.autograd.grad(y, [x for x in tensors[:6] if x is not None], weight)

    expected = run(lambda x: x.repeat_interleave(2, 2))
    for i, (y, wanted) in enumerate(zip(run(lambda x: x), expected, strict=True)):
        assert_within(y, wanted, 1e-12, f"result {i}")
