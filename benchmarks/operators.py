"""Micro-benchmarks of every operator beside its baseline, by pytest-benchmark.

    pytest benchmarks
    pytest benchmarks --benchmark-json=after.json
    pytest benchmarks --benchmark-autosave && pytest benchmarks --benchmark-compare

A group holds our operator and its baselines, on the same data: softmax attention
(`F.scaled_dot_product_attention`), plain PyTorch (`backend="reference"`), and for SPE's features a
matrix product with as many multiplications. B=1, H=8, D=E=64, float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases.peers import sdpa
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastpe
from fastpe.ops.sine_features import sine_features

HEADS, WIDTH, TOKENS = 8, 64, 2048
OURS, PLAIN = "auto", "reference"
Run = Callable[..., Tensor]


def inputs(tokens: int = TOKENS) -> list[Tensor]:
    """Return q, k and v, [1, tokens, HEADS, WIDTH], with gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, tokens, HEADS, WIDTH
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def attention(backend: str, encoding: fastpe.PositionalEncoding | None = None, **options) -> Run:
    """Return the attention as a function of q, k and v."""
    options = {"pos_encoding": encoding, "backend": backend, **options}
    return lambda q, k, v: fastpe.causal_linear_attention(q, k, v, **options)


def features(backend: str, encoding: fastpe.PositionalEncoding) -> Run:
    """Return the features of the queries as a function of q, k and v."""
    positions = torch.arange(TOKENS, dtype=torch.float64).view(1, -1, 1)
    if backend == PLAIN:
        return lambda q, k, v: encoding.features(q, positions, "q")
    return lambda q, k, v: sine_features(
        q, positions, encoding.make_maps(q.device)[0], backend="cpu"
    )


def product(multiplications: int) -> Run:
    """Return a product of square matrices with about as many multiplications."""
    size = round(multiplications ** (1 / 3))
    a, b = torch.randn(2, size, size, requires_grad=True)
    return lambda q, k, v: (a @ b) + 0 * q.sum()


def sinespe() -> fastpe.SineSPE:
    """Return SineSPE with 64 realisations of 10 sines."""
    return fastpe.SineSPE(WIDTH, HEADS, seed=0).eval()


def favor() -> fastpe.Favor:
    """Return FAVOR+ with 128 features."""
    return fastpe.Favor(128, seed=0).eval()


# {group: {name: maker of the function to time}}
GROUPS: dict[str, dict[str, Callable[[], Run]]] = {
    "causal_dot": {
        "fastpe": lambda: attention(OURS),
        "fastpe-rope": lambda: attention(OURS, fastpe.RoPE(WIDTH)),
        "plain": lambda: attention(PLAIN),
        "sdpa": lambda: sdpa,
    },
    "sine_features": {
        "fastpe": lambda: features(OURS, sinespe()),
        "plain": lambda: features(PLAIN, sinespe()),
        "torch.mm": lambda: product(TOKENS * HEADS * WIDTH * 21 * 64),
    },
    "favor": {
        "fastpe": lambda: attention(OURS, feature_map=favor()),
        "plain": lambda: attention(PLAIN, feature_map=favor()),
        "sdpa": lambda: sdpa,
    },
}
CASES = [
    pytest.param(group, name, backward, id=f"{group}-{name}-{'both' if backward else 'forward'}")
    for group, names in GROUPS.items()
    for name in names
    for backward in (False, True)
]


@pytest.mark.parametrize(("group", "name", "backward"), CASES)
def test_operator(benchmark: BenchmarkFixture, group: str, name: str, backward: bool) -> None:
    """Time a forward, or a forward and backward, with T = 2048 tokens."""
    run, leaves = GROUPS[group][name](), inputs()
    benchmark.group = f"{group}, {'forward and backward' if backward else 'forward'}"
    if not backward:
        with torch.no_grad():
            assert benchmark(run, *leaves).isfinite().all()
        return
    grad = torch.ones_like(run(*leaves))

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    assert benchmark(both)[0].isfinite().all()


STEPS = {"none": lambda: None, "rope": lambda: fastpe.RoPE(WIDTH), "sinespe": sinespe}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", [OURS, PLAIN])
def test_step(benchmark: BenchmarkFixture, name: str, backend: str) -> None:
    """Time one more token after 256."""
    benchmark.group = f"step, {name}"
    options = {"pos_encoding": STEPS[name](), "backend": backend}
    with torch.no_grad():
        q, k, v = (x.detach() for x in inputs(257))
        prefix = (x[:, :256] for x in (q, k, v))
        _, state = fastpe.causal_linear_attention(*prefix, output_final_state=True, **options)
        token = [x[:, 256] for x in (q, k, v)]
        o, _ = benchmark(fastpe.causal_linear_attention_step, *token, state, **options)
    assert o.isfinite().all()


@pytest.mark.parametrize("length", [256, 4096])
def test_step_of_softmax(benchmark: BenchmarkFixture, length: int) -> None:
    """Time softmax attention for one token with a cache of keys and values."""
    benchmark.group = "step, none"
    q, k, v = (x.detach().transpose(1, 2) for x in inputs(length))
    with torch.no_grad():
        attend = torch.nn.functional.scaled_dot_product_attention
        assert benchmark(attend, q[:, :, -1:], k, v).isfinite().all()
