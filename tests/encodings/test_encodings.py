"""Each encoding: its closed-form kernel, its invariances, its limits, its defaults."""

import copy
import math

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions

import fastpe
from fastpe import FStripe, RoPE, RoPEPool, SineSPE, causal_linear_attention

NOISY = ("sinespe", "sinespe-ungated", "fstripe-sff", "convspe")
EXACT = [p for p in encodings("-none") if p.id not in NOISY]
SINES = [p for p in encodings("-none") if p.id.startswith(("sinespe", "fstripe"))]
# relative in every product of features, docs/math.md, "The kernel of an encoding"
SHIFT_INVARIANT = [p for p in EXACT if p.id not in ("ropepool", "fstripe-pooled", "custom")]
SHIFT_VARIANT = encodings("ropepool", "fstripe-pooled")


def _products(encoding, q, k, positions_q, positions_k):
    """Return q^_m . k^_n, [B, H, M, N]."""
    q = encoding.features(q, positions_q, "q")
    k = encoding.features(k, positions_k, "k")
    return torch.einsum("bmhr,bnhr->bhmn", q, k)


def _example(make, d=6, h=3):
    encoding = make(d, h).double()
    q, k, _ = make_inputs(2, 9, h, d, 1)
    return encoding, q, k, make_positions(encoding, 2, 9), make_positions(encoding, 2, 9, 1)


@pytest.mark.parametrize("make", EXACT)
def test_kernel_is_what_the_features_give(make):
    encoding, q, k, positions_q, positions_k = _example(make)
    actual = _products(encoding, q, k, positions_q, positions_k)
    left, right = positions_q[:, :, None], positions_k[:, None]
    if encoding.num_levels == 1:
        left, right = left[..., 0], right[..., 0]
    c = encoding.kernel(left, right)
    assert c.dtype == torch.float64
    assert c.shape[:3] == (2, 9, 9)
    assert c.shape[3] in (1, 3)
    assert c.shape[4:] == (6, 6)
    scale = (encoding.feature_dim / 6) ** 0.5
    wanted = torch.einsum("bmhd,bmnhde,bnhe->bhmn", q, c.expand(2, 9, 9, 3, 6, 6), k)
    assert_within(actual, scale * wanted, 1e-11)


@pytest.mark.parametrize("make", encodings("-none"))
def test_kernel_of_lags(make):
    encoding, _, _, positions, _ = _example(make)
    at = positions[0] if encoding.num_levels > 1 else positions[0, :, 0]
    assert torch.equal(encoding.kernel(at), encoding.kernel(at, torch.zeros_like(at)))
    moved = encoding.kernel(at + 5, torch.full_like(at, 5))
    if make in [p.values[0] for p in SHIFT_VARIANT]:
        assert (moved - encoding.kernel(at)).abs().max() > 0.1
    else:
        assert_within(moved, encoding.kernel(at), 1e-11)


@pytest.mark.parametrize("make", EXACT)
def test_paper_scale(make):
    """scale="paper" drops sqrt(R / D)."""
    encoding, q, k, positions_q, positions_k = _example(make)
    if not hasattr(encoding, "scale") or isinstance(encoding, SineSPE):
        pytest.skip("one scale only")
    matched = _products(encoding, q, k, positions_q, positions_k)
    encoding.scale = "paper"
    paper = _products(encoding, q, k, positions_q, positions_k)
    assert_within(matched, paper * (encoding.feature_dim / 6) ** 0.5, 1e-12)


@pytest.mark.parametrize("make", SHIFT_INVARIANT)
def test_shift_invariant(make):
    """T8."""
    encoding, q, k, positions_q, positions_k = _example(make)
    here = _products(encoding, q, k, positions_q, positions_k)
    assert_within(_products(encoding, q, k, positions_q + 7, positions_k + 7), here, 1e-11)
    assert (_products(encoding, q, k, positions_q + 7, positions_k) - here).abs().max() > 0.1


@pytest.mark.parametrize("make", SHIFT_VARIANT)
def test_not_shift_invariant(make):
    """T8: what the papers do not say of their pooled features."""
    encoding, q, k, positions_q, positions_k = _example(make)
    here = _products(encoding, q, k, positions_q, positions_k)
    there = _products(encoding, q, k, positions_q + 7, positions_k + 7)
    assert (there - here).norm() > 0.1 * here.norm()


@pytest.mark.parametrize("make", encodings("-none"))
def test_features_are_linear(make):
    encoding, q, k, positions, _ = _example(make)
    for side in "qk":
        both = encoding.features(2 * q - 3 * k, positions, side)
        one, other = (encoding.features(x, positions, side) for x in (q, k))
        assert both.shape == (2, 9, 3, encoding.feature_dim)
        assert_within(both, 2 * one - 3 * other, 1e-12)


# RoPE and RoPEPool


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half"])
def test_ropepool_is_its_equations(interleaved):
    """T9: eqs. (23) and (26) of arXiv 2504.05364, and RoPE turned back by 45 degrees."""
    encoding = RoPEPool(8, 2, interleaved=interleaved, scale="paper", per_head=False).double()
    q, k, _ = make_inputs(1, 11, 2, 8, 1)
    s = make_positions(encoding, 1, 11)
    actual = _products(encoding, q, k, s, s)
    i = torch.arange(4)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
    theta = 10000.0 ** (-2 * i.double() / 8)
    q1, q2, k1, k2 = q[0][..., first], q[0][..., second], k[0][..., first], k[0][..., second]
    angle = (s[0] * theta)[:, None]  # [T, 1, W]
    minus = angle[:, None] - angle[None]
    plus = angle[:, None] + angle[None]
    q1, q2, k1, k2 = q1[:, None], q2[:, None], k1[None], k2[None]
    eq23 = (q1 * k1 + q2 * k2) * minus.cos() + (q1 * k2 - q2 * k1) * minus.sin()
    eq23 = eq23 + (q1 * k1 - q2 * k2) * plus.sin() + (q1 * k2 + q2 * k1) * plus.cos()
    # theta went through a float32 parameter
    assert_within(actual[0], eq23.sum(-1).movedim(-1, 0), 1e-5)
    with torch.no_grad():
        encoding.theta.copy_(theta[None, :, None])
    assert_within(_products(encoding, q, k, s, s)[0], eq23.sum(-1).movedim(-1, 0), 1e-12)
    g = []
    for x in (q, k):
        x1, x2 = x[0][..., first], x[0][..., second]
        polar = torch.atan2(x2, x1) + angle - math.pi / 4
        g.append(math.sqrt(2) * torch.hypot(x1, x2) * polar.cos())
    assert_within(encoding.features(q, s, "q")[0], g[0], 1e-12)
    eq26 = torch.einsum("mhw,nhw->hmn", g[0], g[1])
    assert_within(_products(encoding, q, k, s, s)[0], eq26, 1e-12)
    turned = angle - math.pi / 4
    x1, x2 = q[0][..., first], q[0][..., second]
    rope = math.sqrt(2) * (x1 * turned.cos() - x2 * turned.sin())
    assert_within(encoding.features(q, s, "q")[0], rope, 1e-12)


def test_rope_halves_are_a_permutation():
    x, _, _ = make_inputs(1, 10, 2, 12, 1)
    s = make_positions(RoPE(12), 1, 10)
    order = torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2)))
    pairs = RoPE(12).features(x, s, "q")[..., order]
    assert_within(RoPE(12, interleaved=False).features(x[..., order], s, "q"), pairs, 1e-14)


def test_rope_frequencies():
    turn = 2 * math.pi
    assert_within(RoPE(8).frequencies()[0, :, 0] * turn, 10000.0 ** (-torch.arange(4) / 4.0), 1e-6)
    fixed = RoPE(6, 3, per_head=True, base=500.0).frequencies() * turn
    for h in range(3):
        for i in range(3):
            wanted = 500.0 ** (-2 * (i + h / 3) / 6)
            assert fixed[h, i].tolist() == pytest.approx([wanted], rel=1e-14)
    learned = RoPE(6, 3, per_head=True, base=500.0, num_levels=2, learned=True).frequencies() * turn
    assert_within(learned, fixed.expand(-1, -1, 2) / 2, 1e-6)
    assert not list(RoPE(8).parameters())
    assert RoPEPool(8, 2).theta.shape == (2, 4, 1)
    partial = RoPE(8, rotary_dim=4)
    x, _, _ = make_inputs(1, 5, 1, 8, 1)
    y = partial.features(x, make_positions(partial, 1, 5), "q")
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert_within(partial.frequencies()[0, :, 0] * turn, torch.tensor([1, 0.01]), 1e-7)


def test_half_precision_module_keeps_frequencies():
    """A fixed RoPE under module.bfloat16() turns by the very same angles."""
    encoding, halved = RoPE(16), RoPE(16).bfloat16()
    assert torch.equal(encoding.frequencies(), halved.frequencies())
    assert torch.equal(copy.deepcopy(halved).half().frequencies(), encoding.frequencies())
    x, _, _ = make_inputs(1, 30, 1, 16, 1)
    s = 1e5 + torch.arange(30, dtype=torch.float64)[None, :, None]
    assert torch.equal(halved.features(x, s, "q"), encoding.features(x, s, "q"))


def test_fstripe_of_one_sine_is_rope():
    """F-StrIPE_1 turns pairs [x_d, 0] (arXiv 2504.05364, eq. 15; docs/math.md, "F-StrIPE")."""
    encoding = FStripe(4, 1, num_sines=1, pool=False, unit_gains=True, scale="paper").double()
    assert [name for name, _ in encoding.named_parameters()] == ["freqs"]
    x, _, _ = make_inputs(1, 12, 1, 4, 1)
    s = make_positions(encoding, 1, 12)
    rope = RoPE(8, 1, learned=True, per_head=True).double()
    with torch.no_grad():
        # F-StrIPE turns by up to half a turn a unit
        rope.theta.copy_(math.pi * encoding.freqs.sigmoid()[:, :, 0])
    pairs = torch.stack((x, torch.zeros_like(x)), -1).flatten(-2)
    assert_within(encoding.features(x, s, "q"), rope.features(pairs, s, "q"), 1e-12)


# sines


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_exact_features_are_the_closed_form(gated):
    """T3, with C written out from docs/math.md, "SPE with sines"."""
    encoding = SineSPE(5, 2, num_sines=3, num_realizations=None, gated=gated)
    narrow, encoding = encoding, copy.deepcopy(encoding).double()
    q, k, _ = make_inputs(1, 20, 2, 5, 1)
    s = torch.arange(20, dtype=torch.float64)[None, :, None]
    f, lam = encoding.freqs[..., 0].sigmoid() / 2, torch.nn.functional.softplus(encoding.gains)
    lag = (s[0] - s[0].T)[:, :, None, None, None]
    p = (lam**2 * (2 * math.pi * f * lag + encoding.offsets).cos()).sum(-1) / 6
    g = encoding.gate.sigmoid() if gated else torch.zeros(2, 5)
    c = (1 - g) * p + g  # [T, T, H, D]
    r = 5 * (6 + gated)
    assert encoding.feature_dim == r
    wanted = math.sqrt(r / 5) * torch.einsum("mhd,nhd,mnhd->hmn", q[0], k[0], c)
    assert_within(_products(encoding, q, k, s, s)[0], wanted, 1e-11)
    assert_within(_products(narrow, q.float(), k.float(), s, s)[0], wanted, 1e-5)


@pytest.mark.parametrize("make", SINES)
@pytest.mark.parametrize(
    ("name", "value"),
    [("gate", 40), ("gate", -40), ("gains", -40), ("gains", -200), ("freqs", 40), ("freqs", -40)],
)
def test_saturated_parameters(backend, make, name, value):
    """T16: values and gradients stay finite."""
    encoding = make(6, 2)
    if not hasattr(encoding, name):
        pytest.skip(f"no {name}")
    with torch.no_grad():
        getattr(encoding, name).fill_(value)
    q, k, v = (leaf(x) for x in make_inputs(1, 30, 2, 6, 4, torch.float32))
    positions = make_positions(encoding, 1, 30).requires_grad_()
    o = causal_linear_attention(
        *(q, k, v), pos_encoding=encoding, positions=positions, backend=backend
    )
    o.square().sum().backward()
    for x in (o, q.grad, k.grad, v.grad, positions.grad):
        assert x.isfinite().all()
    for key, p in encoding.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("make", SINES)
def test_open_gate_switches_position_off(make):
    """The sign of the PyTorch package: g = 1 leaves the content alone (docs/math.md)."""
    encoding, q, k, positions_q, positions_k = _example(make)
    if not encoding.gated:
        pytest.skip("no gate")
    with torch.no_grad():
        encoding.gate.fill_(60)
    here = _products(encoding, q, k, positions_q, positions_k)
    assert_within(_products(encoding, q, k, positions_k * 3, positions_q - 1), here, 1e-11)


@pytest.mark.parametrize("start", [0, 4096, 10**6])
@pytest.mark.parametrize("make", encodings("-none", "-custom"))
def test_long_positions(backend, make, start):
    """float32 stays within 1e-5 of float64 wherever the sequence begins (docs/math.md)."""
    encoding = make(8, 2)
    q, k, v = make_inputs(1, 40, 2, 8, 6, torch.float32)
    positions = start + torch.arange(40)
    if encoding.num_levels > 1:
        positions = positions[:, None] - torch.tensor([0, 5, 9])
    options = {"positions": positions, "feature_map": "identity", "normalize": False}
    narrow = causal_linear_attention(
        q, k, v, pos_encoding=encoding, backend=backend, **options
    ).detach()
    wide = copy.deepcopy(encoding).double()
    exact = oracle.attention(
        *(q.double(), k.double(), v.double(), wide),
        positions.double().reshape(1, 40, -1),
        dict(wide.named_parameters()),
        feature_map="identity",
        normalize=False,
    )[0]
    assert_within(narrow, exact, 1e-5)


def test_integer_positions_beyond_24_bits(backend):
    """A relative encoding gives the same at 2^40, if the positions are integers."""
    q, k, v = make_inputs(1, 20, 1, 8, 6)
    steps = torch.arange(20)
    options = {"pos_encoding": RoPE(8), "backend": backend}
    here = causal_linear_attention(q, k, v, positions=steps, **options)
    there = causal_linear_attention(q, k, v, positions=2**40 + steps, **options)
    assert_within(there, here, 1e-3)
    assert_within(
        causal_linear_attention(q, k, v, positions=2**26 + 1 + steps, **options), here, 1e-7
    )


CHANGES = {
    "in place": lambda p: p.add_(0.5),
    "data": lambda p: p.data.add_(0.5),
    "data replaced": lambda p: setattr(p, "data", p + 0.5),
    "data copied": lambda p: p.data.copy_(p + 0.5),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("make", encodings("rope-learned", "ropepool", "sinespe", "fstripe-pooled"))
def test_changed_parameters_are_seen(make, change):
    """Nothing computed from parameters may outlive them, with gradients or without."""
    q, k, v = make_inputs(1, 9, 2, 4, 4)

    def run(encoding):
        return causal_linear_attention(q, k, v, pos_encoding=encoding, backend="reference")

    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        encoding = make(4, 2).double()
        with mode():
            before = run(encoding)
        with torch.no_grad():
            for p in encoding.parameters():
                CHANGES[change](p)
        fresh = make(4, 2).double()
        fresh.load_state_dict(encoding.state_dict())
        with mode():
            assert not torch.equal(run(encoding), before)
            assert torch.equal(run(encoding), run(fresh))


@pytest.mark.parametrize("make", encodings("rope-learned", "sinespe", "fstripe-pooled"))
def test_parameters_of_a_functional_call(make):
    """Other parameters at the same address, as torch.func.functional_call puts them there."""
    encoding = make(4, 2).double()
    q, k, v = make_inputs(1, 9, 2, 4, 4)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoding = encoding

        def forward(self):
            return causal_linear_attention(q, k, v, pos_encoding=self.encoding, backend="reference")

    layer = Layer()
    with torch.no_grad():
        results = []
        for shift in range(4):
            given = {name: p + shift for name, p in layer.named_parameters()}
            results.append(torch.func.functional_call(layer, given, ()))
            del given
        for shift, o in enumerate(results):
            twin = copy.deepcopy(encoding)
            for p in twin.parameters():
                p.add_(shift)
            assert torch.equal(
                o, causal_linear_attention(q, k, v, pos_encoding=twin, backend="reference")
            )


# defaults and initial values


def test_defaults():
    """docs/math.md and the table of 5b."""
    assert SineSPE(16, 2).feature_dim == 64
    assert SineSPE(16, 2).num_sines == 10
    assert SineSPE(16, 2).gated
    assert SineSPE(16, 2, num_realizations=None).feature_dim == 16 * 21
    assert FStripe(16, 2).feature_dim == 64
    assert FStripe(16, 2, pool=False).feature_dim == 32
    assert FStripe(16, 2, num_realizations=24).feature_dim == 24
    assert not FStripe(16, 2).gated
    assert RoPE(16).feature_dim == 16
    assert RoPE(16).apply_order == "after"
    assert RoPEPool(16, 2).feature_dim == 8


def test_initial_parameters():
    """As SPE's code draws them, by the moments that docs/math.md gives for K = 10."""
    encoding = SineSPE(100, 50, num_sines=10)
    f = encoding.freqs.sigmoid() / 2
    assert f.median().item() == pytest.approx(0.009, rel=0.03)
    low, high = f.flatten().sort().values[[2500, 47500]].tolist()
    assert low == pytest.approx(0.0018, rel=0.05)
    assert high == pytest.approx(0.043, rel=0.05)
    lam = torch.nn.functional.softplus(encoding.gains)
    assert (lam**2).mean().item() / 2 == pytest.approx(0.51, abs=0.006)
    p0 = (lam**2 * encoding.offsets.cos()).mean()
    assert p0.item() / 2 == pytest.approx(0.31, abs=0.01)
    assert encoding.gate.std().item() == pytest.approx(1, abs=0.04)


def test_what_is_not_overridden_says_so():
    encoding = fastpe.PositionalEncoding(4)
    for call in (lambda: encoding.feature_dim, lambda: encoding.kernel(torch.ones(1))):
        with pytest.raises(NotImplementedError):
            call()


def test_initial_frequencies():
    """Their median is what was asked for, at each level."""
    torch.manual_seed(0)
    for frequency, wanted in ((None, [0.009] * 2), (0.13, [0.13] * 2), ([0.01, 0.2], [0.01, 0.2])):
        encoding = FStripe(64, 8, num_levels=2, frequency=frequency)
        found = (encoding.freqs.sigmoid() / 2).flatten(0, -2).median(0).values
        # 16384 normal numbers: their median is off by 0.01
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0.05, atol=0)
