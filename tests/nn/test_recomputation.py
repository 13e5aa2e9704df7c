"""Activation checkpointing: a forward that is run again has the noise that it had."""

import copy
import gc

import pytest
import torch
from helpers import assert_within
from torch.utils.checkpoint import checkpoint

from fastpe import SineSPE
from fastpe.nn import CausalLinearAttention

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def _layer(backend="reference", **options):
    torch.manual_seed(5)
    options = {"num_sines": 2, "num_realizations": 8, "seed": 1} | options
    return CausalLinearAttention(8, 2, pos_encoding=SineSPE(4, 2, **options), backend=backend)


# layers


class _Block(torch.nn.Module):
    def __init__(self, backend, **options):
        super().__init__()
        self.attention = _layer(backend, **options)
        self.dropout = torch.nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.attention(x))


def _train(blocks, x, run, steps=2):
    """Return losses, gradients and keys of a few steps, from one state of torch's generator."""
    torch.manual_seed(8)
    out = []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        y = leaf
        for block in blocks:
            y = run(block, y)
        blocks.zero_grad()
        y.square().sum().backward()
        out += [y.detach(), leaf.grad, *(p.grad.clone() for p in blocks.parameters())]
    keys = [block.attention.pos_encoding.noise_key for block in blocks]
    return [*out, *keys]


@REENTRANT
@pytest.mark.parametrize("resample", ["forward", 2, "never"])
def test_checkpoint_recomputes_with_the_same_noise(backend, reentrant, resample):
    """Gradients to the bit, for one block and for two, and over steps."""
    blocks = torch.nn.ModuleList([_Block(backend, resample=resample) for _ in range(2)])
    again = copy.deepcopy(blocks)
    x = torch.randn(2, 7, 8)
    plain = _train(blocks, x, lambda block, y: block(y))
    saved = _train(again, x, lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    for actual, expected in zip(saved, plain, strict=True):
        assert torch.equal(actual, expected)


@REENTRANT
def test_checkpoint_of_several_forwards(backend, reentrant):
    """Two forwards before one backward, as in accumulation: each gets its own noise again."""
    block = _Block(backend)
    again = copy.deepcopy(block)
    x = torch.randn(2, 7, 8)

    def run(module, call):
        torch.manual_seed(8)
        leaf = x.clone().requires_grad_()
        (call(module, leaf).square().sum() + call(module, 2 * leaf).sum()).backward()
        after = module(x)  # the noise goes on, too
        return [leaf.grad, *(p.grad for p in module.parameters()), after]

    plain = run(block, lambda module, y: module(y))
    saved = run(again, lambda module, y: checkpoint(module, y, use_reentrant=reentrant))
    for actual, expected in zip(saved, plain, strict=True):
        # reentrant backward adds up the same numbers in another order
        assert_within(actual, expected, 1e-6 if reentrant else 0)


def test_checkpoint_leaves_the_step_alone():
    """Afterwards evaluation uses the noise that it would without checkpointing."""
    block = _Block("reference")
    x = torch.randn(2, 7, 8, requires_grad=True)
    (
        checkpoint(block, x, use_reentrant=False) + checkpoint(block, x, use_reentrant=False)
    ).sum().backward()
    assert block.attention.pos_encoding.noise_key[1] == 2


@REENTRANT
def test_checkpoint_without_the_generator_is_refused(backend, reentrant):
    block = _Block(backend)
    x = torch.randn(2, 7, 8, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        y.sum().backward()


def test_forwards_from_one_generator_state_are_told_apart(backend):
    """One at a time each has its noise again; two at once cannot be told apart, which is said."""
    block = _Block(backend)
    x = torch.randn(2, 7, 8, requires_grad=True)

    def forward():
        torch.manual_seed(8)
        return checkpoint(block, x, use_reentrant=False).sum()

    for _ in range(2):
        forward().backward()
    both = forward() + forward()
    with pytest.raises(RuntimeError, match="several forwards began with"):
        both.backward()


@REENTRANT
def test_checkpointed_layers_that_share(backend, reentrant):
    """Each layer is run again alone, behind the forward of another batch."""
    blocks = torch.nn.ModuleList(_Block(backend) for _ in range(3))
    source = blocks[0].attention.pos_encoding
    for block in blocks[1:]:
        block.attention.pos_encoding = source.share()
    again = copy.deepcopy(blocks)
    batches = torch.randn(2, 2, 7, 8)

    def run(blocks, call):
        torch.manual_seed(8)
        leaf = batches.clone().requires_grad_()
        outputs = []
        for x in leaf:
            for block in blocks:
                x = call(block, x)
            outputs.append(x.square().sum())
        sum(outputs).backward()
        return [leaf.grad, *(p.grad for p in blocks.parameters())]

    plain = run(blocks, lambda block, y: block(y))
    saved = run(again, lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    for actual, expected in zip(saved, plain, strict=True):
        assert_within(actual, expected, 1e-5)


# which noise, by the count alone


class _Counted(torch.nn.Module):
    """x times the step of the noise, so that the gradient of x is the sum of all steps."""

    def __init__(self, noisy):
        super().__init__()
        self.noisy = noisy

    def forward(self, x):
        self.noisy.maybe_resample_()
        return x * self.noisy.noise_key[1].double()

    @property
    def remembered(self):
        gc.collect()
        return len(self.noisy._forwards._known)


def _spe(**options):
    return SineSPE(4, 2, num_sines=2, num_realizations=8, seed=1, **options)


def _x():
    return torch.ones((), dtype=torch.float64, requires_grad=True)


@REENTRANT
def test_any_number_of_forwards_before_a_backward(reentrant):
    n, x, module = 1030, _x(), _Counted(_spe())
    sum(checkpoint(module, x, use_reentrant=reentrant) for _ in range(n)).backward()
    assert x.grad == n * (n + 1) / 2
    assert module.noisy.step == n


@REENTRANT
def test_nothing_is_remembered_longer_than_its_graph(reentrant):
    """But for the last forward; without checkpoints nothing is at all."""
    x, module = _x(), _Counted(_spe())
    for _ in range(5):
        module(x)
        with torch.no_grad():
            module(x)
    with torch.autograd.graph.save_on_cpu():
        for _ in range(5):
            module(x)
    assert module.remembered == 1
    kept = [checkpoint(module, x, use_reentrant=reentrant) for _ in range(5)]
    assert module.remembered == 5
    sum(kept).backward()
    del kept[1:]
    assert module.remembered <= 2
    del kept
    assert module.remembered == 1


@REENTRANT
def test_backward_twice(reentrant):
    x, module = _x(), _Counted(_spe())
    y = checkpoint(module, x, use_reentrant=reentrant) + checkpoint(
        module, x, use_reentrant=reentrant
    )
    y.backward(retain_graph=True)
    module(x)
    y.backward()
    assert x.grad == 2 * (1 + 2)


# of torch, about a reentrant checkpoint inside another
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("outer", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "non-reentrant"])
def test_nested(outer, inner):
    x, module = _x(), _Counted(_spe())

    def inside(x):
        return module(x).sin() + module(2 * x)

    def outside(x):
        y = checkpoint(inside, x, use_reentrant=inner)
        return module(y) + checkpoint(inside, y, use_reentrant=inner)

    def run(call):
        torch.manual_seed(8)
        module.noisy.reseed_(1)
        sum(call(outside, x) for _ in range(3)).backward()
        module(x)
        found, x.grad = x.grad, None
        return found, module.noisy.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "checkpoint", lambda f, x, **_: f(x))
        wanted = run(lambda f, x: f(x))
    found = run(lambda f, x: checkpoint(f, x, use_reentrant=outer))
    assert_within(found[0], wanted[0], 1e-12)
    assert found[1] == wanted[1]


def test_an_output_that_nothing_needs():
    """The forward runs again for another output of the same checkpoint."""
    x, module = _x(), _Counted(_spe())

    def both(x):
        return module(x), x.sin()

    outputs = [checkpoint(both, x, use_reentrant=False)[1] for _ in range(3)]
    sum(outputs).backward()
    assert_within(x.grad, 3 * torch.ones((), dtype=torch.float64).cos(), 1e-12)


def test_inside_of_other_hooks():
    x, module = _x(), _Counted(_spe())
    with torch.autograd.graph.save_on_cpu():
        sum(checkpoint(module, x, use_reentrant=False) for _ in range(3)).backward()
    assert x.grad == 1 + 2 + 3


class _Again(torch.autograd.Function):
    """A reentrant checkpoint of somebody else."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x, ctx.state = function, x, torch.get_rng_state()
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            x = ctx.x.detach().requires_grad_()
            ctx.function(x).backward(grad)
        return None, x.grad


def test_checkpointing_of_somebody_else():
    x, module = _x(), _Counted(_spe())
    sum(_Again.apply(module, x) for _ in range(3)).backward()
    assert x.grad == 1 + 2 + 3


def test_hooks_of_somebody_else():
    """The last forward is known whatever runs it again; of others it is said."""
    x, module = _x(), _Counted(_spe())

    def run():
        state = torch.get_rng_state()

        def again(_):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.set_rng_state(state)
                return module(torch.ones(())).double()

        with torch.autograd.graph.saved_tensors_hooks(lambda x: None, again):
            return module(x)

    run()
    run().backward()
    assert x.grad == 2
    first, _second = run(), run()
    with pytest.raises(RuntimeError, match="no forward before began with"):
        first.backward()


def test_noise_does_not_depend_on_the_generator():
    """Ranks are seeded differently, and their noise must be the same."""
    keys = []
    for seed in (1, 2):
        x, module = _x(), _Counted(_spe())
        torch.manual_seed(seed)
        sum(checkpoint(module, x, use_reentrant=False) for _ in range(3)).backward()
        keys.append((module.noisy.noise_key.tolist(), x.grad.item()))
    assert keys[0] == keys[1] == ([1, 3], 6.0)
