"""The noise of FAVOR+: what is drawn, the kernel that it estimates, when it is redrawn."""

import copy
import math

import oracle
import pytest
import torch
from helpers import assert_within, traced
from torch.utils.checkpoint import checkpoint

from fastpe import Favor, FStripe, SineSPE
from fastpe.nn import CausalLinearAttention
from fastpe.ops import noise

H, D = 3, 8


def test_omega_is_philox_made_orthogonal():
    """Blocks of F columns are orthogonal, and each keeps its own length."""
    psi = Favor(2 * 20, seed=1234)
    w = psi.omega(H, D, torch.float64)
    z = oracle.normal(1234, 0, 0, 3, H, D, 20)
    assert_within(w.norm(dim=-2), z.norm(dim=-2), 1e-14)
    for block in w.split(D, -1):
        gram = block.mT @ block
        assert_within(torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), gram, 1e-14)
    # Gram-Schmidt, first column first
    assert_within(w[..., 0], z[..., 0], 1e-14)
    first, second = z[..., 0], z[..., 1]
    second = second - (second * first).sum(-1, True) / first.square().sum(-1, True) * first
    second = second / second.norm(dim=-1, keepdim=True) * z[..., 1].norm(dim=-1, keepdim=True)
    assert_within(w[..., 1], second, 1e-13)
    assert_within(Favor(2 * 20, seed=1234, orthogonal=False).omega(H, D, torch.float64), z, 1e-14)


def test_directions_are_uniform():
    """Entries of Haar frames: mean 0, variance 1/F, fourth moment 3 / (F (F + 2))."""
    z = torch.randn(4000, 4, 4, dtype=torch.float64)
    w = noise.orthogonalized(z)
    u = w / w.norm(dim=-2, keepdim=True)
    for column in range(4):
        x, n = u[..., column], 16000
        assert abs(x.mean()) < 5 * (1 / 4 / n) ** 0.5
        assert abs(x.square().mean() - 1 / 4) < 5 * (1 / 8 / n) ** 0.5
        assert abs((x**4).mean() - 1 / 8) < 5 * (1 / 8 / n) ** 0.5
        # a column stands on the side of the one that it was made of
        assert ((x * z[..., column]).sum(-1) > 0).all()


def test_heads_have_one_omega_or_their_own():
    shared, own = Favor(per_head=False, seed=1).omega(3, 4), Favor(seed=1).omega(3, 4)
    assert torch.equal(shared[0], shared[2])
    assert torch.equal(shared[0], own[0])
    assert not torch.equal(own[0], own[2])


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_kernel_is_unbiased(orthogonal, signs):
    """The mean over draws is exp(q . k / sqrt(F)) within 5 sigma."""
    q, k = 0.7 * torch.randn(2, 1, 6, dtype=torch.float64)
    draws = 4000
    psi = Favor(12, orthogonal=orthogonal, signs=signs, seed=2)
    # heads are independent draws
    phi, omega = (psi(x.expand(draws, 6)) for x in (q, k))
    kernels = (phi * omega).sum(-1)
    wanted = math.exp((q * k).sum() / math.sqrt(6))
    assert abs(kernels.mean() - wanted) < 5 * kernels.std() / draws**0.5
    assert kernels.std() > 0.01 * wanted


def test_default_number_of_features():
    assert Favor().feature_dim(D) == 2 * D
    assert Favor(signs=False).feature_dim(D) == D
    assert Favor(14).feature_dim(D) == 14
    assert Favor(14)(torch.randn(5, H, D)).shape == (5, H, 14)


@pytest.mark.parametrize(
    "make",
    [lambda: SineSPE(4, 1, num_sines=2, num_realizations=None), lambda: FStripe(4, 1, pool=False)],
    ids=["sinespe", "fstripe"],
)
def test_one_stage_expectation(make):
    """The mean over draws is exp(sum_d q_d k_d C_d / sqrt(D)), within 5 sigma."""
    encoding = make().double()
    q, k = 0.8 * torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)
    at_q, at_k = torch.tensor(3.0), torch.tensor(1.5)
    maps = encoding.make_maps()
    kernels = []
    for seed in range(1000):
        psi = Favor(8, seed=seed)
        features = []
        for x, position, position_map in ((q, at_q, maps[0]), (k, at_k, maps[1])):
            exponent, half = psi.exponents(x, position.double().view(1, 1, 1), position_map)
            features.append((exponent - half).exp() / 8**0.5)
        kernels.append((features[0] * features[1]).sum().detach())
    kernels = torch.stack(kernels)
    c = encoding.kernel(at_q, at_k)[0]
    wanted = torch.exp(q.flatten() @ c @ k.flatten() / 2)
    assert abs(kernels.mean() - wanted) < 5 * kernels.std() / len(kernels) ** 0.5
    assert kernels.std() > 0.01 * wanted


def test_two_stage_expectation():
    """SPE's noise inflates the kernel, as docs/math.md, "SPE with sines" says: within 5 sigma."""
    draws, r, d = 4000, 16, 4
    encoding = SineSPE(d, 1, num_sines=2, num_realizations=r, gated=False).double()
    many = SineSPE(d, draws, num_sines=2, num_realizations=r, gated=False, seed=1).double()
    with torch.no_grad():
        for p, source in zip(many.parameters(), encoding.parameters(), strict=True):
            p.copy_(source.expand_as(p))
    q, k = torch.randn(2, d, dtype=torch.float64)
    at_q, at_k = torch.tensor(3.0), torch.tensor(1.5)
    psi, features = Favor(32, seed=2), []
    for x, position, side in ((q, at_q, "q"), (k, at_k, "k")):
        x = x.expand(1, 1, draws, d)
        features.append(psi(many.features(x, position.double().view(1, 1, 1), side)))
    kernels = (features[0] * features[1]).sum(-1).detach().flatten()
    c = encoding.kernel(at_q, at_k)[0].diagonal()
    # without offsets a component agrees with itself by the mean of lambda^2 / 2
    own = torch.nn.functional.softplus(encoding.gains[0].detach()).square().mean(-1) / 2
    rho, sq, sk = (q * k * c).sum(), (q * q * own).sum(), (k * k * own).sum()
    t = 1 / (r * d**0.5)
    wanted = ((1 - t * rho) ** 2 - t * t * sq * sk) ** (-r / 2)
    assert abs(kernels.mean() - wanted) < 5 * kernels.std() / draws**0.5
    assert kernels.std() > 0.01 * wanted


def _layer(backend="reference", **options):
    torch.manual_seed(5)
    encoding = SineSPE(4, 2, num_sines=2, num_realizations=8, seed=1, **options)
    psi = Favor(12, seed=2, **options)
    return CausalLinearAttention(8, 2, pos_encoding=encoding, feature_map=psi, backend=backend)


def test_redraw_policy():
    x = torch.randn(2, 5, 8)

    def keys(layer, n):
        return [layer(x) is None or layer.feature_map.noise_key[1].item() for _ in range(n)]

    assert len(set(keys(_layer(), 6))) == 6
    every = keys(_layer(resample=3), 9)
    assert len(set(every)) in (3, 4)
    assert max(every.count(key) for key in every) == 3
    assert len(set(keys(_layer(resample="never"), 4))) == 1
    layer = _layer()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    resumed = _layer()
    resumed.feature_map.resample_()
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(layer.train()(x), resumed(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_with_the_same_noise(backend, reentrant):
    """Gradients to the bit, over steps, with the noise of the encoding and of the map."""

    def train(layers, run):
        torch.manual_seed(8)
        out = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = leaf
            for layer in layers:
                y = y + run(layer, y)
            layers.zero_grad()
            y.square().sum().backward()
            out += [y.detach(), leaf.grad, *(p.grad.clone() for p in layers.parameters())]
        return out

    layers = torch.nn.ModuleList(_layer(backend) for _ in range(2))
    again, x = copy.deepcopy(layers), torch.randn(2, 7, 8)
    plain = train(layers, lambda layer, y: layer(y))
    saved = train(again, lambda layer, y: checkpoint(layer, y, use_reentrant=reentrant))
    for actual, expected in zip(saved, plain, strict=True):
        assert torch.equal(actual, expected)


def test_state_belongs_to_its_noise():
    """That of the encoding and that of the map."""
    x = torch.randn(1, 4, 8)
    for part in ("pos_encoding", "feature_map"):
        layer = _layer()
        _, state = layer(x, output_final_state=True)
        assert state.noise.tolist() == [1, 1, 2, 1]
        layer.step(x[:, 0], state)
        getattr(layer, part).resample_()
        with pytest.raises(ValueError, match=r"another .* of noise"):
            layer.step(x[:, 0], state)


@traced
def test_compiled(compiled):
    """One graph, noise and stabiliser in it."""
    layer, x = _layer(), torch.randn(2, 9, 8)
    twin = copy.deepcopy(layer)
    run = compiled(layer)
    for _ in range(2):
        assert_within(run(x), twin(x), 1e-5)
    assert layer.feature_map.step == 2
