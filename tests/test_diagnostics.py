"""What the diagnostics say of noise and kernels, against draws of it."""

import functools
import math
import sys

import pytest
import torch
from helpers import assert_within, make_inputs

from fastpe import ConvSPE, FStripe, RoPE, SineSPE
from fastpe.diagnostics import (
    content_kernel,
    estimate_kernel,
    num_realizations_for,
    plot_kernel,
    signal_to_noise,
)

D, H, R = 3, 2, 4
ROWS = D * 5


def _spe(r=R, **options):
    return SineSPE(D, H, num_sines=2, num_realizations=r, seed=3, **options)


def _sff(r=R, **options):
    return FStripe(D, H, num_sines=2, num_realizations=r, seed=3, **options)


def _conv(r=R):
    return ConvSPE(D, H, kernel_size=4, num_realizations=r, seed=3)


GAUSSIAN = [
    pytest.param(_spe, id="sinespe"),
    pytest.param(functools.partial(_spe, gated=False), id="sinespe-ungated"),
    pytest.param(functools.partial(_sff, num_levels=2), id="sff"),
    pytest.param(functools.partial(_sff, scale="paper"), id="paper"),
    pytest.param(_conv, id="convspe"),
]
ORTHOGONAL = pytest.param(functools.partial(_spe, noise="orthogonal"), id="orthogonal")


def _made(make, r):
    torch.manual_seed(1)
    encoding = make(r)
    with torch.no_grad():
        if hasattr(encoding, "freqs"):
            encoding.freqs.add_(2)
    return encoding.double()


def _positions(encoding):
    s = torch.tensor([0, 1, 3, -2]).double()
    return s if encoding.num_levels == 1 else torch.stack((s, s.flip(0)), -1)


def _estimates(encoding, q, k, r, draws):
    """Return estimates of q^T C k from r realisations each, [draws, groups, M, N, H]."""
    s = _positions(encoding).view(1, 4, -1)
    paper = getattr(encoding, "scale", "matched") == "paper"
    scale = 1 if paper else (encoding.feature_dim / D) ** 0.5
    out = []
    with torch.no_grad():
        for _ in range(draws):
            q_hat, k_hat = (
                encoding.features(x, s, side)[0].unflatten(-1, (-1, r))
                for x, side in ((q, "q"), (k, "k"))
            )
            groups = q_hat.shape[2]
            out.append(torch.einsum("mhgr,nhgr->gmnh", q_hat, k_hat) * groups / scale)
            encoding.resample_()
    return torch.stack(out)


@pytest.mark.parametrize(
    ("make", "r", "groups", "draws"),
    # realisations of Gaussian noise are independent: many are many draws of a few
    [pytest.param(*p.values, R, 1000, 20, id=p.id) for p in GAUSSIAN]
    + [pytest.param(*ORTHOGONAL.values, r, 1, 3000, id=f"orthogonal-{r}") for r in (4, ROWS + 2)],
)
def test_signal_to_noise(make, r, groups, draws):
    """Mean and deviation, each within 5 sigma of what the closed form says."""
    q, k, _ = make_inputs(1, 4, H, D, 1)
    few, many = _made(make, r), _made(make, r * groups)
    s = _positions(few)
    ratio = signal_to_noise(few, s[:, None], s[None], q[0][:, None], k[0][None])
    assert ratio.shape == (4, 4, H)
    assert ratio.dtype == torch.float64
    samples = _estimates(many, q, k, r, draws).flatten(0, 1)
    mean = torch.einsum("mhd,mnhde,nhe->mnh", q[0], few.kernel(s[:, None], s[None]), k[0])
    stated, centred = (mean / ratio) ** 2, (samples - mean) ** 2
    assert (ratio.sign() == mean.sign()).all()
    assert ((samples.mean(0) - mean).abs() < 5 * (stated / len(samples)) ** 0.5).all()
    assert ((centred.mean(0) - stated).abs() < 5 * centred.std(0) / len(samples) ** 0.5).all()


@pytest.mark.parametrize("make", [*GAUSSIAN, ORTHOGONAL])
def test_estimate_of_the_kernel(make):
    """20 000 realisations, within 5 sigma of every entry, those off the diagonal too."""
    r, draws = 400, 50
    encoding = _made(make, r)
    s, before = _positions(encoding), encoding.noise_key.clone()
    estimate = estimate_kernel(encoding, s[:, None], s[None], draws)
    assert torch.equal(encoding.noise_key, before)
    c = encoding.kernel(s[:, None], s[None])
    assert estimate.shape == c.shape
    # entry (d, e) is the product for unit vectors, of power C_d^0 C_e^0; orthogonal noise has less
    power = encoding.power("q")[..., :, None] * encoding.power("k")[..., None, :]
    sigma = ((power + c**2) / (draws * r)).sqrt()
    assert ((estimate - c).abs() < 5 * sigma).all()


@pytest.mark.parametrize("positions", [torch.tensor(2.0), torch.arange(3.0)], ids=["one", "lags"])
def test_estimate_without_noise_is_exact(positions):
    for encoding in (RoPE(4), FStripe(4, 2), SineSPE(4, 2, num_realizations=None)):
        c = encoding.double().kernel(positions)
        assert_within(estimate_kernel(encoding, positions, draws=2), c, 1e-12)


def test_no_noise_where_columns_are_a_basis():
    encoding = _spe(2 * ROWS, noise="orthogonal")
    assert signal_to_noise(encoding, torch.arange(3)).isinf().all()


def test_defaults_are_ones_and_lags():
    encoding = ConvSPE(D, H, kernel_size=4, num_realizations=9)
    lags = torch.arange(-4, 5)
    ratio = signal_to_noise(encoding, lags)
    assert torch.equal(ratio, signal_to_noise(encoding, lags + 3, torch.tensor(3)))
    assert torch.equal(ratio, signal_to_noise(encoding, lags, q=torch.ones(H, D)))
    # docs/math.md, "SPE with sines", from the correlation
    c = encoding.kernel(lags).sum((-2, -1))
    c = c / (encoding.power("q").sum(-1) * encoding.power("k").sum(-1)).sqrt()
    assert_within(ratio, 3 * c / (1 + c**2).sqrt(), 1e-12)


def test_realizations_for_a_ratio():
    """docs/math.md, "SPE with sines": at R = 64 a correlation of 0.1 has 0.8."""
    assert num_realizations_for(0.79, 0.1) <= 64 < num_realizations_for(0.81, 0.1)
    for snr, c in ((1.0, 0.1), (3.0, -0.5), (0.1, 1.0)):
        r = num_realizations_for(snr, c)
        for n, enough in ((r, True), (r - 1, False)):
            assert (math.sqrt(n) * abs(c) / math.sqrt(1 + c * c) >= snr * (1 - 1e-12)) == enough
    for bad in ((0, 0.5), (math.inf, 0.5), (1, 0), (1, 1.5), (1, math.nan)):
        with pytest.raises(ValueError, match="must be"):
            num_realizations_for(*bad)


@pytest.mark.parametrize("encoding", [None, RoPE(4), SineSPE(4, 2, num_realizations=None)])
def test_an_encoding_without_noise_is_refused(encoding):
    with pytest.raises(ValueError, match="encoding must be one with noise"):
        signal_to_noise(encoding, torch.arange(3))


# pictures


@pytest.mark.parametrize("make", [*GAUSSIAN, ORTHOGONAL])
def test_content_kernel(make):
    draws, encoding = 20, _made(make, 301)
    s = _positions(encoding)
    c = encoding.kernel(s[:, None], s[None]).sum((-2, -1)) / D
    for head in range(H):
        assert_within(content_kernel(encoding, s, head=head), c[..., head], 1e-12)
        estimate = content_kernel(encoding, s, head=head, draws=draws)
        ratio = signal_to_noise(encoding, s[:, None], s[None])[..., head]
        sigma = (c[..., head] / ratio).abs() / draws**0.5
        assert ((estimate - c[..., head]).abs() < 5 * sigma).all()


def test_bad_arguments():
    encoding = _spe()
    with pytest.raises(ValueError, match=r"head must be in 0\.\.1, got 2"):
        content_kernel(encoding, torch.arange(3), head=2)
    for call in (content_kernel, estimate_kernel):
        with pytest.raises(ValueError, match="draws must be a positive int, got 0"):
            call(encoding, torch.arange(3), draws=0)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    s = torch.arange(5.0)
    exact, estimate = plot_kernel(_spe(), s, tmp_path / "kernel.png", head=1, draws=3)
    assert exact.shape == estimate.shape == (5, 5)
    assert (tmp_path / "kernel.png").read_bytes()[:4] == b"\x89PNG"


def test_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_kernel(_spe(), torch.arange(3.0), str(tmp_path / "kernel.png"))


def test_axes_that_are_given():
    drawn = []

    class Axis:
        def imshow(self, values, **options):
            drawn.append((values, options["vmin"], options["vmax"]))

        def set_xlabel(self, text):
            pass

        set_ylabel = set_xlabel

    encoding = _spe()
    exact, estimate = plot_kernel(encoding, torch.arange(4.0), (Axis(), Axis()), draws=2)
    for (values, low, high), wanted in zip(drawn, (exact, estimate), strict=True):
        assert (values == wanted.numpy()).all()
        assert -low == high == exact.abs().max()
