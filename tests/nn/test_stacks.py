"""What training stacks do with the layer: compile, export, shard, replicate, differentiate."""

import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import encodings
from helpers import Problem, assert_within, leaf, make_inputs, traced
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from fastpe import SineSPE, causal_linear_attention
from fastpe.nn import CausalLinearAttention

# torch's own derivatives are made with it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.fixture(params=["reference", "cpu"])
def either(request):
    """The reference, and the native backend on the code path that it picks itself."""
    if request.param == "reference":
        return "reference"
    return request.getfixturevalue("native_kernels")


def _layer(make, backend, **options):
    torch.manual_seed(3)
    return CausalLinearAttention(12, 3, pos_encoding=make(4, 3), backend=backend, **options)


# compilation and export


@traced
def test_every_encoding_compiles(make_encoding, native_kernels, compiled):
    """As one graph, with state, positions and every gradient; layers are in test_extension.py."""
    problem = Problem(make_encoding(8, 2))
    problem.check(problem.run(native_kernels, function=compiled(causal_linear_attention)))


@traced
@pytest.mark.parametrize(
    ("chosen", "name"),
    [("cpu", "none"), ("cpu", "rope"), ("cpu", "sinespe"), ("reference", "rope")],
)
def test_one_graph_for_every_length(request, chosen, name):
    """The first length is taken for fixed, the second for any."""
    if chosen == "cpu":
        request.getfixturevalue("native_kernels")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = _layer(encodings(name)[0].values[0], chosen).eval()
    fast = torch.compile(layer, backend=counter, fullgraph=True)
    for t in (9, 10, 17, 70, 130):
        x = make_inputs(2, t, 1, 12, 1, torch.float32)[0][:, :, 0].requires_grad_()
        y = fast(x)
        expected = layer(x)
        assert_within(y, expected, 1e-5)
        grads = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
        assert_within(*grads, 1e-5)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@traced
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Inductor
def test_compiled_by_inductor(native_kernels):
    torch._dynamo.reset()
    layer = _layer(encodings("sinespe")[0].values[0], native_kernels).eval()
    x = torch.randn(2, 9, 12)

    def run(module):
        y = module(x)
        return y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    fast = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(run(fast), run(layer), strict=True):
        assert_within(actual, expected, 1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize("make", encodings("rope", "sinespe"))
def test_exported_with_any_length(either, make):
    layer = _layer(make, either).eval()
    shapes = {"x": {1: Dim.DYNAMIC}}
    program = export(layer, (torch.randn(2, 9, 12),), dynamic_shapes=shapes).module()
    for t in (2, 9, 65, 200):
        x = torch.randn(2, t, 12)
        assert_within(program(x), layer(x), 1e-5)


# torch.func


def _loss(q, k, v, backend, encoding=None):
    options = {"pos_encoding": encoding, "backend": backend}
    return causal_linear_attention(q, k, v, **options).square().sum()


def test_functional_gradient():
    """The reference has it, with that of parameters by functional_call."""
    inputs = make_inputs(2, 9, 3, 8, 6)
    leaves = [leaf(x) for x in inputs]
    encoding = encodings("sinespe")[0].values[0](8, 3)
    wanted = torch.autograd.grad(_loss(*leaves, "reference", encoding), leaves)
    found = torch.func.grad(_loss, argnums=(0, 1, 2))(*inputs, "reference", encoding)
    for actual, expected in zip(found, wanted, strict=True):
        assert_within(actual, expected, 1e-12)
    layer = _layer(encodings("rope-learned")[0].values[0], "reference")
    x, parameters = torch.randn(2, 9, 12), dict(layer.named_parameters())

    def of_parameters(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(of_parameters)(parameters)
    wanted = torch.autograd.grad(of_parameters(parameters), list(parameters.values()))
    for actual, expected in zip(found.values(), wanted, strict=True):
        assert_within(actual, expected, 1e-5)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap"])
def test_kernels_refuse_transforms(native_kernels, transform):
    q, k, v = make_inputs(2, 9, 3, 8, 6)
    encoding = encodings("sinespe")[0].values[0](8, 3)

    def run(q):
        return _loss(q, k, v, native_kernels, encoding)

    calls = {
        "grad": lambda: torch.func.grad(run)(q),
        "vjp": lambda: torch.func.vjp(run, q),
        "jvp": lambda: torch.func.jvp(run, (q,), (q,)),
        "vmap": lambda: torch.func.vmap(run)(q[None]),
    }
    with pytest.raises(RuntimeError, match="backend='reference'"):
        calls[transform]()


# replicas and shards


class _Model(torch.nn.Module):
    def __init__(self, resample, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        torch.manual_seed(5)
        encoding = SineSPE(4, 3, num_sines=2, num_realizations=8, seed=1, resample=resample)
        self.attention = CausalLinearAttention(12, 3, pos_encoding=encoding)
        self.norm = torch.nn.LayerNorm(12)

    def forward(self, x):
        if self.checkpointed:
            return self.norm(x + checkpoint(self.attention, x, use_reentrant=False))
        return self.norm(x + self.attention(x))


def _batch(step):
    return make_inputs(4, 9, 1, 12, 1, torch.float32, seed=step)[0][:, :, 0]


def _train(model, part=slice(None), steps=2):
    """Train on a part of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        # two forwards before a backward
        outputs = [model(_batch(step + i)[part]) for i in (0, 3)]
        loss = sum(y.square().mul(_batch(step + 7)[part]).mean() for y in outputs)
        loss.backward()
        optimizer.step()
    return model


def _numbers(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def _replicated(group, resample, checkpointed):
    rank, model = dist.get_rank(group), _Model(resample, checkpointed)
    torch.manual_seed(rank)  # as for dropout of its own
    if rank:
        # what DDP sends at first, and buffers at every forward
        with torch.no_grad():
            for x in model.parameters():
                x.zero_()
        model.attention.pos_encoding.reseed_(7)
    replica = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    _train(replica, slice(2 * rank, 2 * rank + 2))
    return _numbers(model)


def _sharded(group, resample, checkpointed):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    # that nn.Linear returns a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    rank, model = dist.get_rank(group), _Model(resample, checkpointed)
    torch.manual_seed(rank)
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in (model.attention, model):
        fully_shard(module, mesh=mesh)
    _train(model, slice(2 * rank, 2 * rank + 2))
    whole = {
        n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in _numbers(model).items()
    }
    return {name: x.clone() for name, x in whole.items()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("resample", ["forward", "never"])
@pytest.mark.parametrize("stack", [_replicated, _sharded], ids=["ddp", "fsdp2"])
def test_training_in_parallel(ranks, stack, resample, checkpointed):
    """Two steps on halves of the batch are two steps on all of it, whatever seeds ranks have."""
    trained = _train(_Model(resample))
    wanted, start = _numbers(trained), _numbers(_Model(resample))
    assert trained.attention.pos_encoding.step == (4 if resample == "forward" else 0)
    for found in ranks(2, stack, resample, checkpointed):
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            assert_within(x.double(), wanted[name].double(), 1e-5, name)
            if x.is_floating_point():
                assert not torch.equal(x, start[name]), name
