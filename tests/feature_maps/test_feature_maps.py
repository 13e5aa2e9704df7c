"""Feature maps that are modules: formulas written out, and their place in the attention."""

import math

import pytest
import torch
from conftest import encodings
from helpers import assert_within, leaf, make_inputs, make_positions

import fastpe
from fastpe import DPFP, Favor, FeatureMap, Hedgehog, RoPE, RoPEPool, Taylor2
from fastpe.nn import CausalLinearAttention

B, T, H, D, E = 2, 37, 3, 8, 6


def _hedgehog(width, num_heads):
    psi = Hedgehog(width, num_heads).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in psi.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return psi


class Pairs(FeatureMap):
    """A map of the caller: a learned weight, and one feature for two components."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def feature_dim(self, width):
        return width // 2

    def forward(self, x):
        return (self.weight.to(x.dtype) * (x[..., 0::2] + x[..., 1::2])).exp()


# formulas, on the components of one vector


def _dpfp(x, nu):
    r = [max(y, 0) for y in (*x, *(-x))]
    return [r[j] * r[(j + i) % len(r)] for i in range(1, nu + 1) for j in range(len(r))]


def _softmax(y):
    total = sum(y.exp()) + sum((-y).exp())
    return [*(y.exp() / total), *((-y).exp() / total)]


MAPS = [
    pytest.param(lambda width, heads: "dpfp", id="dpfp"),
    pytest.param(lambda width, heads: DPFP(3), id="dpfp-3"),
    pytest.param(lambda width, heads: "taylor2", id="taylor2"),
    pytest.param(_hedgehog, id="hedgehog"),
    pytest.param(lambda width, heads: Pairs(), id="custom"),
]


def _module(psi):
    """Return the module that a name stands for."""
    return fastpe.feature_maps.WIDE_MAPS[psi]() if isinstance(psi, str) else psi


@pytest.mark.parametrize("nu", [1, 3])
def test_dpfp_is_its_formula(nu):
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    wanted = [[_dpfp(row, nu) for row in rows] for rows in x]
    assert_within(DPFP(nu)(x), torch.tensor(wanted, dtype=torch.float64), 1e-15)
    assert DPFP(nu).feature_dim(4) == 8 * nu


def test_taylor2_kernel_is_the_series_of_exp():
    q, k = torch.randn(2, 50, 2, 7, dtype=torch.float64)
    s = (q * k).sum(-1) / math.sqrt(7)
    psi = Taylor2()
    assert psi(q).shape[-1] == psi.feature_dim(7) == 1 + 7 + 28
    assert_within((psi(q) * psi(k)).sum(-1), 1 + s + s**2 / 2, 1e-14)


def test_hedgehog_is_a_softmax_of_each_head():
    psi, x = _hedgehog(4, 2), torch.randn(5, 2, 4, dtype=torch.float64)
    wanted = torch.empty(5, 2, 8, dtype=torch.float64)
    for i in range(5):
        for h in range(2):
            y = psi.weight[h].detach() @ x[i, h] + psi.bias[h].detach()
            wanted[i, h] = torch.tensor(_softmax(y), dtype=torch.float64)
    assert_within(psi(x), wanted, 1e-14)
    assert_within(Hedgehog(4, 2)(x.float()), torch.cat((x, -x), -1).softmax(-1).float(), 2**-22)


def _weighted(phi, psi, v, eps):
    # every query against every key up to its own
    weights = torch.einsum("bthr,bshr->bhts", phi, psi).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhts,bshe->bthe", weights, v)


def _encoding(make):
    encoding = make(D, H)
    if encoding is None:
        return None
    if isinstance(encoding, RoPE):
        encoding.apply_order = "before"
    return encoding.double()


@pytest.mark.parametrize("make_map", MAPS)
def test_output_and_every_gradient(backend, make_encoding, make_map):
    """Encode, map, attend: each written out by its own definition."""
    encoding = _encoding(make_encoding)
    width = D if encoding is None else encoding.feature_dim
    psi = make_map(width, H)
    module = _module(psi)
    q, k, v = (leaf(x) for x in make_inputs(B, T, H, D, E))
    positions = make_positions(encoding, B, T)
    o = fastpe.causal_linear_attention(
        q, k, v, pos_encoding=encoding, positions=positions, feature_map=psi, backend=backend
    )
    sides = (
        x if encoding is None else encoding.features(x, positions, side)
        for x, side in ((q, "q"), (k, "k"))
    )
    wanted = _weighted(*(module(x) for x in sides), v, 1e-6)
    assert_within(o, wanted, 1e-11)
    leaves = [q, k, v, *module.parameters()]
    leaves += [] if encoding is None else list(encoding.parameters())
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, leaves, weight)
    for g, exact in zip(found, torch.autograd.grad(wanted, leaves, weight), strict=True):
        assert_within(g, exact, 1e-10)


@pytest.mark.parametrize("make_map", MAPS)
@pytest.mark.parametrize("make", encodings("none", "rope-before", "sinespe"))
def test_prefill_and_step(backend, make, make_map):
    encoding = _encoding(make)
    psi = make_map(D if encoding is None else encoding.feature_dim, H)
    q, k, v = make_inputs(B, 9, H, D, E)
    options = {"pos_encoding": encoding, "feature_map": psi, "backend": backend}
    whole, end = fastpe.causal_linear_attention(q, k, v, output_final_state=True, **options)
    o, state = fastpe.causal_linear_attention(
        q[:, :7], k[:, :7], v[:, :7], output_final_state=True, **options
    )
    parts = [o]
    for t in (7, 8):
        o, state = fastpe.causal_linear_attention_step(q[:, t], k[:, t], v[:, t], state, **options)
        parts.append(o[:, None])
    assert_within(torch.cat(parts, 1), whole, 1e-11)
    assert_within(state.s, end.s, 1e-11)
    assert_within(state.z, end.z, 1e-11)
    assert state.c is None


@pytest.mark.parametrize("make_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(backend, make_map, dtype):
    """Features and sums in float32 whatever the inputs; the output is rounded once."""
    q, k, v = make_inputs(B, T, H, D, E, dtype)
    psi = make_map(D, H)
    o, state = fastpe.causal_linear_attention(
        q, k, v, feature_map=psi, output_final_state=True, backend=backend
    )
    assert (o.dtype, state.s.dtype) == (dtype, torch.float32)
    module = _module(psi)
    wanted = _weighted(module(q.double()), module(k.double()), v.double(), 1e-6)
    assert_within(o, wanted, 1e-5 if dtype == torch.float32 else 2**-8)


def test_a_name_is_its_module():
    """One configuration, so that states fit."""
    q, k, v = make_inputs(1, 4, 2, 4, 4)
    for name, module in (("dpfp", DPFP()), ("taylor2", Taylor2())):
        o, state = fastpe.causal_linear_attention(
            q, k, v, feature_map=name, output_final_state=True
        )
        again, _ = fastpe.causal_linear_attention(
            q, k, v, feature_map=module, output_final_state=True, initial_state=state
        )
        assert torch.equal(fastpe.causal_linear_attention(q, k, v, feature_map=module), o)
        with pytest.raises(ValueError, match="initial_state was made with"):
            fastpe.causal_linear_attention(
                q, k, v, feature_map=Favor(), initial_state=state, output_final_state=True
            )
        assert again.shape == o.shape


class _Wrong(Pairs):
    def forward(self, x):
        return x


Q, K, V = make_inputs(1, 4, 2, 4, 4)
BAD = [
    ({"feature_map": "dpfp", "pos_encoding": RoPE(4)}, "pos_encoding must have apply='before'"),
    ({"feature_map": Taylor2(), "pos_encoding": RoPEPool(4, 2)}, "apply='before'"),
    ({"feature_map": Favor(), "pos_encoding": RoPE(4)}, "apply='before'"),
    ({"feature_map": Hedgehog(4, 3)}, "q must have H = 3 of feature_map"),
    ({"feature_map": Hedgehog(8, 2)}, "feature_map is for head_dim = 8, got width 4"),
    ({"feature_map": Hedgehog(4, 2).to("meta")}, "q must be on feature_map's meta, got cpu"),
    ({"feature_map": DPFP(8)}, "nu must be less than twice the width 4, got 8"),
    ({"feature_map": Favor(), "normalize": False}, "normalize must be True with Favor"),
    ({"feature_map": Favor(), "normalize": "abs"}, "normalize must be True with Favor"),
    ({"feature_map": _Wrong()}, r"feature_map must return \(1, 4, 2, 2\) on cpu, got shape"),
    ({"feature_map": torch.nn.ReLU()}, "feature_map must be one of .* or a fastpe.FeatureMap"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_combinations(changes, message):
    with pytest.raises(ValueError, match=message):
        fastpe.causal_linear_attention(Q, K, V, backend="reference", **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPFP(0), "nu must be a positive int, got 0"),
        (lambda: Hedgehog(0, 2), "head_dim must be a positive int, got 0"),
        (lambda: Hedgehog(4, 2.0), "num_heads must be a positive int, got 2.0"),
        (lambda: Favor(7), "num_features must be even with signs, got 7"),
        (lambda: Favor(-2), "num_features must be a positive int, got -2"),
        (lambda: Favor(orthogonal=1), "orthogonal must be True or False, got 1"),
        (lambda: Favor(resample=0), "resample must be 'forward', 'never' or a positive int"),
        (lambda: Favor(seed=2**63), "seed must be an int of 64 bits"),
        (
            lambda: CausalLinearAttention(8, 2, pos_encoding=RoPE(4), feature_map="dpfp"),
            "apply='before'",
        ),
    ],
)
def test_bad_constructions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make_map", MAPS)
def test_layer(backend, make_map):
    """A part of the layer: its parameters learn, its state dict holds them."""
    layer = CausalLinearAttention(
        H * D, H, feature_map=make_map(D, H), backend=backend, dtype=torch.float64
    )
    x = torch.randn(2, 9, H * D, dtype=torch.float64)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name  # noqa: PT018
    names = {name for name in layer.state_dict() if name.startswith("feature_map.")}
    module = _module(layer.feature_map)
    assert names == {f"feature_map.{name}" for name, _ in module.named_parameters()}
    assert "feature_map=" in repr(layer)
