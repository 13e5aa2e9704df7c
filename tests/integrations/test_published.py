"""Parameters of the published SPE packages, in their layouts, give the published kernels."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_within

from fastpe import ConvSPE, RoPE, SineSPE, load_spe_state_dict

H, D, K, TAPS = 2, 3, 4, 5


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sines():
    return {name: _numbers(H, D, K, seed=i) for i, name in enumerate(("freqs", "offsets", "gains"))}


def _sine_kernel(given, lag):
    """P_d of the published SineSPE: codes over (2 K)^(1/2), offsets on the queries' side."""
    f = 1 / (1 + np.exp(-given["freqs"].double().numpy())) / 2
    gains = np.log1p(np.exp(given["gains"].double().numpy()))
    phase = 2 * math.pi * f * lag + given["offsets"].double().numpy()
    return torch.from_numpy((gains**2 * np.cos(phase)).sum(-1) / (2 * K))


def _conv_kernel(by_q, by_k, lag):
    """P_d of codes made from one noise by filters [H D, kappa], of queries and of keys."""
    p = np.zeros(H * D)
    for j in range(TAPS):
        if 0 <= j + lag < TAPS:
            p += by_q[:, j] * by_k[:, j + lag]
    return torch.from_numpy(p).view(H, D)


def _gated(p, gate, package):
    """PyTorch's SPEFilter has sqrt(1 - g) before the code, JAX's SPEGate has sqrt(g)."""
    g = torch.sigmoid(gate.double())
    return (1 - g) * p + g if package == "pytorch" else g * p + (1 - g)


def _check(module, kernel, lags=range(-6, 7)):
    c = module.double().kernel(torch.tensor(list(lags))).diagonal(dim1=-2, dim2=-1)
    assert_within(c, torch.stack([kernel(lag) for lag in lags]), 1e-6)


@pytest.mark.parametrize("package", ["pytorch", "jax"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("realizations", [8, None])
def test_sine_spe(package, gated, realizations):
    given, gate = _sines(), _numbers(H, D, seed=5)
    module = SineSPE(D, H, num_sines=K, num_realizations=realizations, gated=gated)
    state = given | ({"gate": gate} if gated else {})
    state = state if package == "pytorch" else {n: x.numpy() for n, x in state.items()}
    load_spe_state_dict(module, state, package=package)

    def kernel(lag):
        p = _sine_kernel(given, lag)
        return _gated(p, gate, package) if gated else p

    _check(module, kernel)


@pytest.mark.parametrize("package", ["pytorch", "jax"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("realizations", [8, None])
def test_conv_spe(package, gated, realizations):
    """PyTorch's conv_k makes Qbar and conv_q Kbar; JAX's names are right."""
    conv_q, conv_k = _numbers(H * D, TAPS, seed=1), _numbers(H * D, TAPS, seed=2)
    gate = _numbers(H, D, seed=5)
    if package == "pytorch":
        state = {"conv_q.weight": conv_q[:, None], "conv_k.weight": conv_k[:, None]}
        by_q, by_k = conv_k, conv_q
    else:
        state = {
            name: {"kernel": x.T[:, None].numpy()}
            for name, x in (("conv_q", conv_q), ("conv_k", conv_k))
        }
        by_q, by_k = conv_q, conv_k
    module = ConvSPE(D, H, kernel_size=TAPS, num_realizations=realizations, gated=gated)
    load_spe_state_dict(module, state | ({"gate": gate} if gated else {}), package=package)

    def kernel(lag):
        p = _conv_kernel(by_q.double().numpy(), by_k.double().numpy(), lag)
        return _gated(p, gate, package) if gated else p

    _check(module, kernel)


def test_pytorch_modules():
    """From torch's own Conv1d, whose state dict it is, and whose output the codes are."""
    torch.manual_seed(0)
    convs = [torch.nn.Conv1d(H * D, H * D, TAPS, groups=H * D, bias=False) for _ in "qk"]
    state = {f"conv_{s}.weight": conv.weight for s, conv in zip("qk", convs, strict=True)}
    module = ConvSPE(D, H, kernel_size=TAPS, gated=False)
    load_spe_state_dict(module, state)
    z = torch.randn(1, H * D, 40)
    for side, conv in zip("qk", reversed(convs), strict=True):
        weight = getattr(module, f"weight_{side}").flatten(0, 1)
        code = torch.einsum("dtj,dj->dt", z[0].unfold(-1, TAPS, 1), weight)
        assert_within(code, conv(z)[0], 1e-5)


def test_share_takes_a_gate():
    share = SineSPE(D, H, num_sines=K).share()
    load_spe_state_dict(share, {"gate": _numbers(H, D)}, package="jax")
    assert torch.equal(share.gate, -_numbers(H, D))


BAD = [
    (SineSPE, {}, ValueError, r"state_dict must have \['freqs', 'gains', 'gate', 'offsets'\]"),
    (SineSPE, _sines(), ValueError, "got .'freqs', 'gains', 'offsets'."),
    (
        SineSPE,
        _sines() | {"gate": torch.ones(D, H)},
        ValueError,
        r"state_dict\['gate'\] must be of shape \(2, 3\), got \(3, 2\)",
    ),
    (
        SineSPE,
        _sines() | {"freqs": torch.ones(H, D, K, 1), "gate": torch.ones(H, D)},
        ValueError,
        r"state_dict\['freqs'\] must be of shape \(2, 3, 4\), got \(2, 3, 4, 1\)",
    ),
    (ConvSPE, _sines(), ValueError, "state_dict must have .'conv_k.weight', 'conv_q.weight'"),
]


@pytest.mark.parametrize(("kind", "state", "error", "message"), BAD)
def test_what_does_not_fit_is_refused(kind, state, error, message):
    module = kind(D, H, **({"num_sines": K} if kind is SineSPE else {"kernel_size": TAPS}))
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(error, match=message):
        load_spe_state_dict(module, state)
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])


def test_bad_arguments():
    with pytest.raises(TypeError, match="module must be a SineSPE or ConvSPE, got RoPE"):
        load_spe_state_dict(RoPE(4), {})
    with pytest.raises(ValueError, match="package must be 'pytorch' or 'jax', got 'tf'"):
        load_spe_state_dict(SineSPE(4, 2), {}, package="tf")
