"""The picture of the kernels: what it shows is the closed form, and the attention's features."""

import pytest
import torch
from helpers import assert_within
from songs import example

import fastpe

image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
kernels = example("kernels")
NAMES = list(kernels.ENCODINGS)


@pytest.fixture(scope="module")
def piece():
    return kernels.pieces.load().tile(40)


@pytest.fixture(params=kernels.PRIORS)
def prior(request):
    return request.param


@pytest.fixture(params=NAMES)
def encoding(request, prior):
    torch.manual_seed(0)
    return kernels.make(request.param, 12 if prior == "BIN" else 1).double()


def test_scores_with_the_same_content_everywhere(piece, prior, encoding):
    at = kernels.positions_of(piece)[prior]
    ones = torch.ones(len(piece), kernels.HEAD_DIM, dtype=torch.float64)
    found = kernels.scores(encoding, at, kernels.Content(ones, ones))
    assert_within(found, fastpe.diagnostics.content_kernel(encoding, at), 1e-12)


def test_scores_of_notes(piece, prior, encoding):
    """Term by term as in `PositionalEncoding.kernel`, and from features, with noise on average."""
    at, content = kernels.positions_of(piece)[prior], kernels.content_of(piece)
    found = kernels.scores(encoding, at, content)
    m, n = torch.tensor([0, 17, 39]), torch.tensor([39, 3, 18])
    with torch.no_grad():
        c = encoding.kernel(at[m], at[n])[:, 0]
    expected = torch.einsum("id,ide,ie->i", content.q[m], c, content.k[n]) / kernels.HEAD_DIM
    assert_within(found[m, n], expected, 1e-12)
    draws, total = 1 if encoding.noise_key is None else 100, 0
    for draw in range(draws):
        if draw:
            encoding.resample_()
        total = total + kernels.scores_from_features(encoding, at, content)
    if encoding.noise_key is None:
        assert_within(total, found, 1e-11)
        return
    # the variance of one product: (s_q s_k + rho^2) / R, see fastpe.diagnostics
    power = content.q.square() @ encoding.power("q")[0] / kernels.HEAD_DIM
    variance = (power[:, None] * power + found**2) / kernels.REALIZATIONS
    assert ((total / draws - found).abs() < 5 * (variance / draws).sqrt()).all()


def test_it_draws(tmp_path, capsys):
    path = tmp_path / "pictures" / "kernels.png"
    kernels.main(["--bars", "1", "--out", str(path)])
    assert image.imread(path).shape[:2] == (864, 1240)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * len(NAMES) + 1
    errors = {line: float(line.split()[-1]) for line in lines[:-1]}
    noisy = {line: error for line, error in errors.items() if "SFF" in line}
    assert len(noisy) == 5
    for line, error in errors.items():
        assert (error > 1e-3) if line in noisy else (error < 1e-12), line


def test_bad_input(tmp_path, capsys):
    options = (["--data", str(tmp_path / "no.npz")], ["--song", "1"], ["--bars", "0"])
    messages = ("does not exist", "song must be 0", "length must be at least 1, got 0")
    for arguments, message in zip(options, messages, strict=True):
        with pytest.raises(SystemExit):
            kernels.main(arguments)
        assert message in capsys.readouterr().err
