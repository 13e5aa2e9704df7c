"""Orthogonal noise: exact where there are as many realisations as rows, else of less variance."""

import math

import pytest
import torch
from helpers import assert_within, make_inputs

from fastpe import FStripe, SineSPE, causal_linear_attention

D, H, K = 3, 2, 2
ROWS = D * (2 * K + 1)


def _spe(r, **options):
    torch.manual_seed(2)
    chosen = {"num_sines": K, "num_realizations": r, "noise": "orthogonal", "seed": 5} | options
    encoding = SineSPE(D, H, **chosen)
    with torch.no_grad():
        encoding.freqs.add_(2)
    return encoding.double()


def _sff(r, **options):
    torch.manual_seed(2)
    chosen = {"num_sines": K, "num_realizations": r, "noise": "orthogonal", "seed": 5}
    return FStripe(D, H, num_levels=2, gated=True, **chosen, **options).double()


def _noise(encoding):  # [H, M, R]
    return encoding.make_maps()[0].noise.flatten(1, 2)


@pytest.mark.parametrize("r", [1, 7, ROWS, ROWS + 4, 2 * ROWS])
@pytest.mark.parametrize("make", [_spe, _sff])
def test_columns_are_orthogonal(make, r):
    z = _noise(make(r))
    assert z.shape == (H, ROWS, r)
    for block in z.split(ROWS, dim=-1):
        wanted = ROWS * torch.eye(block.shape[-1], dtype=torch.float64)
        assert_within(block.mT @ block, wanted.expand(H, -1, -1), 1e-13)


@pytest.mark.parametrize("r", [ROWS, 2 * ROWS], ids=["one-block", "two-blocks"])
@pytest.mark.parametrize("make", [_spe, _sff])
def test_products_are_the_kernel(make, r):
    """T3: as many realisations as rows, or a multiple, leave no noise to the linear kernel."""
    encoding = make(r)
    levels = encoding.num_levels
    q, k, _ = make_inputs(1, 8, H, D, 1)
    s = 9 * torch.randn(1, 8, levels, dtype=torch.float64)
    products = torch.einsum(
        "bmhr,bnhr->mnh", encoding.features(q, s, "q"), encoding.features(k, s, "k")
    )
    at = s[0] if levels > 1 else s[0, :, 0]
    c = encoding.kernel(at[:, None], at[None])
    wanted = torch.einsum("mhd,mnhde,nhe->mnh", q[0], c, k[0])
    assert_within(products, math.sqrt(r / D) * wanted, 1e-11)


def test_exact_in_attention(backend):
    """The same output as the exact features of the same parameters."""
    noisy = _spe(ROWS)
    exact = SineSPE(D, H, num_sines=K, num_realizations=None).double()
    exact.load_state_dict(noisy.state_dict(), strict=False)
    options = {"feature_map": "identity", "normalize": "abs", "eps": 0.1, "backend": backend}
    inputs = make_inputs(2, 9, H, D, 4)
    with torch.no_grad():
        o = causal_linear_attention(*inputs, pos_encoding=noisy, **options)
        wanted = causal_linear_attention(*inputs, pos_encoding=exact, **options)
    assert_within(o, wanted, 1e-11)


@pytest.mark.parametrize("r", [1, 5, 11, ROWS + 5])
def test_variance(r):
    """docs/math.md, about 1 - R / M of the Gaussian's; exactly what a uniform subspace has.

    For columns that are uniform and orthonormal, P_ij the entries of their projection of rank R,
    Var P_ij = R (M - R) / (M (M + 2) (M - 1)) ((1 - 2 / M) d_ij + 1), with Z Z^T = M P.
    """
    draws = 3000
    encoding = _spe(r)
    samples = []
    with torch.no_grad():
        for _ in range(draws):
            z = _noise(encoding)
            samples.append((z[:, 0] * z[:, :2].movedim(1, 0)).sum(-1) / r)
            encoding.resample_()
    samples = torch.stack(samples).movedim(1, 0).flatten(1)  # [2, draws H]: P_00, P_01
    rest = r % ROWS
    for sample, mean, same in zip(samples, (1.0, 0.0), (1 - 2 / ROWS, 0.0), strict=True):
        n = len(sample)
        gaussian = (mean + 1) / r
        stated = rest * (ROWS - rest) / (ROWS * (ROWS + 2) * (ROWS - 1)) * (same + 1)
        stated *= (ROWS / r) ** 2
        centred = (sample - mean) ** 2
        assert abs(sample.mean() - mean) < 5 * (stated / n) ** 0.5
        assert abs(centred.mean() - stated) < 5 * centred.std() / n**0.5
        if r < ROWS:
            # what theory gives without its terms of order 1 / M
            assert stated / gaussian == pytest.approx(1 - r / ROWS, rel=2 / ROWS)


def test_gaussian_noise_is_unchanged():
    """The matrix made orthogonal is the Gaussian one, column after column."""
    z, g = _noise(_spe(7)), _noise(_spe(7, noise="gaussian"))
    coefficients = torch.linalg.solve_triangular(
        torch.linalg.cholesky(g.mT @ g).mT, g, upper=True, left=False
    )
    assert_within(z, ROWS**0.5 * coefficients, 1e-11)


def test_kept_as_long_as_the_noise_lasts():
    encoding = _spe(5)
    first = encoding.make_maps()[0].noise
    assert encoding.make_maps()[0].noise is first
    encoding.resample_()
    assert not torch.equal(encoding.make_maps()[0].noise, first)
    encoding.reseed_(5)
    assert torch.equal(encoding.make_maps()[0].noise, first)


def test_shares_have_all_noise_in_common():
    source = _spe(6)
    noise = _noise(source)
    assert torch.equal(_noise(source.share().double()), noise)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SineSPE, {"noise": "haar"}, "noise must be 'gaussian' or 'orthogonal', got 'haar'"),
        (SineSPE, {"noise": "orthogonal", "num_realizations": None}, "noise must be 'gaussian' wi"),
        (FStripe, {"noise": "orthogonal"}, "noise must be 'gaussian' without num_realizations"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, 2, **options)
