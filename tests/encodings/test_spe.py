"""SPE's noise in expectation: mean, variance and non-linear moments of docs/math.md."""

import math

import pytest
import torch

from fastpe import FStripe, SineSPE
from fastpe.backends import reference
from fastpe.ops.sine_features import sine_features

R = 200_000


def _draw(encoding, t=3):
    """Return rho, sq, sk of docs/math.md, [M, N], and the R products behind each pair.

    The products are for one realisation, that is times sqrt(R): q^_r k^_r of an encoder of R = 1.
    """
    encoding.double()
    d = encoding.head_dim
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, t, 1, d, generator=generator, dtype=torch.float64)
    q, k = q[None], k[None]
    levels = encoding.num_levels
    s = torch.randn(1, t, levels, generator=generator, dtype=torch.float64) * 10
    side_q = encoding.features(q[0], s, "q")[0, :, 0] * R**0.25
    side_k = encoding.features(k[0], s, "k")[0, :, 0] * R**0.25
    freq = encoding.freqs[0].sigmoid() / 2  # [D, K, L]
    lam = torch.nn.functional.softplus(encoding.gains[0])
    lag = 2 * math.pi * ((s[0, :, None] - s[0])[:, :, None, None] * freq).sum(-1)  # [M, N, D, K]
    mean_over = 2 * encoding.num_sines
    c = (lam**2 * (lag + encoding.offsets[0]).cos()).sum(-1) / mean_over
    c0 = (lam**2).sum(-1) / mean_over
    if encoding.gated:
        g = encoding.gate[0].sigmoid()
        c, c0 = (1 - g) * c + g, (1 - g) * c0 + g
    q, k = q[0, 0, :, 0], k[0, 0, :, 0]
    rho = torch.einsum("md,nd,mnd->mn", q, k, c)
    sq, sk = (q**2 * c0).sum(-1)[:, None], (k**2 * c0).sum(-1)[None]
    return rho.detach(), sq.detach(), sk.detach(), side_q.detach(), side_k.detach()


CASES = [
    pytest.param(lambda: SineSPE(3, 1, num_sines=2, num_realizations=R, seed=3), id="gated"),
    pytest.param(
        lambda: SineSPE(4, 1, num_sines=1, num_realizations=R, seed=4, gated=False), id="ungated"
    ),
    pytest.param(
        lambda: FStripe(3, 1, num_sines=2, num_realizations=R, seed=5, num_levels=2), id="sff"
    ),
]


@pytest.fixture(params=CASES, scope="module")
def draw(request):
    torch.manual_seed(2)
    encoding = request.param()
    with torch.no_grad():
        encoding.freqs.add_(2)
    return encoding, _draw(encoding)


def test_mean_is_the_kernel(draw):
    """T2: within 5 sigma of the variance that docs/math.md states."""
    encoding, (rho, sq, sk, q, k) = draw
    d = encoding.head_dim
    products = torch.einsum("mr,nr->mn", q, k) / math.sqrt(R)  # back to R realisations
    sigma = ((sq * sk + rho**2) / d).sqrt()
    assert ((products - math.sqrt(R / d) * rho).abs() < 5 * sigma).all()


def test_closed_form_kernel(draw):
    encoding, (rho, *_) = draw
    generator = torch.Generator().manual_seed(1)
    d, levels = encoding.head_dim, encoding.num_levels
    q, k = torch.randn(2, 1, 3, 1, d, generator=generator, dtype=torch.float64)[:, 0, :, 0]
    s = torch.randn(1, 3, levels, generator=generator, dtype=torch.float64)[0] * 10
    s = s if levels > 1 else s[:, 0]
    c = encoding.kernel(s[:, None], s[None])[:, :, 0]
    wanted = torch.einsum("md,mnde,ne->mn", q, c, k)
    assert (wanted - rho).abs().max() < 1e-11


def test_variance(draw):
    """A3: a product of R realisations has variance (sq sk + rho^2) / D."""
    encoding, (rho, sq, sk, q, k) = draw
    products = q[:, None] * k[None]  # [M, N, R], independent over R
    stated = (sq * sk + rho**2) / encoding.head_dim
    fourth = (products - products.mean(-1, keepdim=True)) ** 4
    error = ((fourth.mean(-1) - stated**2) / R).sqrt()
    assert ((products.var(-1) - stated).abs() < 5 * error).all()
    # realisations do not depend on one another
    halves = products.unflatten(-1, (2, R // 2)) - rho[:, :, None, None] / encoding.head_dim**0.5
    assert (halves.prod(2).mean(-1).abs() < 5 * stated / math.sqrt(R / 2)).all()


def test_exponential_moment(draw):
    """A4: what a softmax kernel sees, inflated by the noise."""
    encoding, (rho, sq, sk, q, k) = draw
    few = 16
    groups = (q[:, None] * k[None]).unflatten(-1, (-1, few)).sum(-1) / few  # q^.k^ / sqrt(16)
    t = 1 / (few * math.sqrt(encoding.head_dim))
    bracket = (1 - t * rho) ** 2 - t**2 * sq * sk
    assert (bracket > 0).all()
    stated = bracket ** (-few / 2)
    sample = groups.exp()
    error = sample.std(-1) / math.sqrt(sample.shape[-1])
    assert ((sample.mean(-1) - stated).abs() < 5 * error).all()


def test_relu_limit(draw):
    """A5: behind ReLU the kernel is the arc-cosine kernel of order 1."""
    encoding, (rho, sq, sk, q, k) = draw
    sample = q.relu()[:, None] * k.relu()[None]
    cos = (rho / (sq * sk).sqrt()).clamp(-1, 1)
    a = cos.acos()
    sigma = (sq * sk).sqrt() / math.sqrt(encoding.head_dim)  # sigma_q sigma_k of one realisation
    stated = sigma / (2 * math.pi) * (a.sin() + (math.pi - a) * cos)
    error = sample.std(-1) / math.sqrt(R)
    assert ((sample.mean(-1) - stated).abs() < 5 * error).all()


def test_structural_noise_averages_to_half_the_exact_kernel():
    """F-StrIPE:SFF keeps SPE's 1 / 2K, eq. 9 has 1 / K (docs/math.md, "F-StrIPE")."""
    torch.manual_seed(0)
    noisy = FStripe(4, 2, num_sines=3, num_realizations=8)
    exact = FStripe(4, 2, num_sines=3, pool=False)
    exact.load_state_dict(
        {k: v for k, v in noisy.state_dict().items() if k in dict(exact.named_parameters())}
    )
    lags = torch.arange(-5.0, 6)
    assert (2 * noisy.kernel(lags) - exact.kernel(lags)).abs().max() < 1e-12


@pytest.mark.parametrize("step", [1.0, 0.0], ids=["different", "equal"])
def test_rounding_at_full_size(kernels, step):
    """T1 in float32: 1344 products in every feature, with and without codes."""
    encoding = SineSPE(64, 2, num_sines=10, num_realizations=64)
    x, positions = torch.randn(1, 48, 2, 64), 4000 + step * torch.arange(48.0).double()
    with torch.no_grad():
        sines = encoding.make_maps()[0]
        wide = sines._replace(noise=sines.noise.double())
        exact = reference.sine_features(x.double(), positions.view(1, -1, 1), wide)
        y = sine_features(x, positions.view(1, -1, 1), sines, backend=kernels)
    assert (y - exact).abs().max() < 1e-6 * exact.abs().max()
