"""Encodings of inputs: learned, sinusoidal, of structure."""

import baseline_oracle
import pytest
import torch
from helpers import assert_within

from fastpe_lab.baselines import LearnedAPE, SinusoidalAPE, StructuralAPE
from fastpe_lab.baselines.stripe import Stripe

B, L = 2, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_learned_ape():
    ape = LearnedAPE(4, 9).double()
    x = torch.randn(B, 9, 4, dtype=torch.float64)
    assert torch.equal(ape(x), x + torch.stack([ape.table[n] for n in range(9)]))
    places = torch.randint(9, (B, 9))
    assert torch.equal(ape(x, places)[1, 3], x[1, 3] + ape.table[places[1, 3]])
    for bad, said in (
        ({"x": torch.zeros(1, 10, 4)}, r"0 \.\.\. 8 \(max_len 9\), got 0 \.\.\. 9"),
        ({"x": x, "positions": torch.arange(-1, 8)}, r"got -1 \.\.\. 7"),
        ({"x": x, "positions": torch.arange(8)}, r"\[T\] or \[B, T\] with B, T = \(2, 9\)"),
    ):
        with pytest.raises(ValueError, match=f"positions must.*{said}"):
            ape(**bad)


@pytest.mark.parametrize("dim", [1, 5, 6])
def test_sinusoidal_ape(dim):
    x = torch.zeros(B, 9, dim, dtype=torch.float64)
    for places in (torch.arange(9), 7 * torch.randn(B, 9, dtype=torch.float64)):
        exact = baseline_oracle.sines(places.double(), dim).expand(B, -1, -1)
        assert_within(SinusoidalAPE(dim)(x, places), exact, 1e-12)
    assert torch.equal(SinusoidalAPE(dim)(x), SinusoidalAPE(dim)(x, torch.arange(9)))


def test_structural_ape():
    ape = StructuralAPE(6, L).double()
    x, positions = torch.randn(B, 9, 6, dtype=torch.float64), torch.randint(9, (B, 9, L))
    e = [baseline_oracle.sines(positions[..., n].double(), 6, 10001.0) for n in range(L)]
    exact = x + sum(torch.einsum("btc,cd->btd", e[n], ape.weight[n]) for n in range(L))
    assert_within(ape(x, positions), exact, 1e-12)
    with pytest.raises(ValueError, match="positions must be given"):
        ape(x)


def test_stripe_and_structural_ape_encode_alike():
    """Queries at label 0 see in SS-RPE what S-APE adds to a token of the opposite label."""
    stripe, ape = Stripe(6, 1, sines=True).double(), StructuralAPE(6, 1).double()
    e = stripe._encoded(torch.tensor([[0.0, 3.0, 7.0]]), 0, torch.float64)[0, :, 0]
    added = ape(torch.zeros(1, 3, 6, dtype=torch.float64), torch.tensor([0, 3, 7]))[0]
    assert_within(e @ ape.weight[0], added, 1e-12)
