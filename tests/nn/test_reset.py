"""`reset_parameters` makes of any memory what construction makes, on any device and in shards."""

import copy
import warnings

import pytest
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpe
from fastpe.nn import CausalLinearAttention, LinearAttention

H, D = 3, 4


def _shared(make):
    source = make()
    return torch.nn.ModuleList([source, source.share(), source.share()])


MODULES = {
    "rope-learned": lambda: fastpe.RoPE(D, H, learned=True, per_head=True),
    "rope-fixed": lambda: fastpe.RoPE(D),
    "ropepool-levels": lambda: fastpe.RoPEPool(D, H, num_levels=2),
    "sinespe": lambda: fastpe.SineSPE(D, H),
    "sinespe-seed": lambda: fastpe.SineSPE(D, H, seed=-5),
    "sinespe-exact": lambda: fastpe.SineSPE(D, H, num_realizations=None),
    "sinespe-shared": lambda: _shared(lambda: fastpe.SineSPE(D, H, seed=2**40 + 1)),
    "convspe": lambda: fastpe.ConvSPE(D, H, kernel_size=3),
    "convspe-exact": lambda: fastpe.ConvSPE(D, H, kernel_size=3, num_realizations=None),
    "convspe-shared": lambda: _shared(lambda: fastpe.ConvSPE(D, H, kernel_size=3)),
    "fstripe-levels": lambda: fastpe.FStripe(D, H, num_levels=2, frequency=[0.1, 0.3]),
    "fstripe-sff": lambda: fastpe.FStripe(D, H, num_realizations=8, gated=True),
    "hedgehog": lambda: fastpe.Hedgehog(D, H),
    "favor": lambda: fastpe.Favor(8),
    "favor-seed": lambda: fastpe.Favor(8, seed=2**62),
    "layer": lambda: CausalLinearAttention(
        H * D, H, pos_encoding=fastpe.SineSPE(D, H), feature_map=fastpe.Favor(8, seed=3)
    ),
    "both-ways": lambda: LinearAttention(
        H * D, H, pos_encoding=fastpe.RoPEPool(D, H), feature_map="elu1"
    ),
}
EACH = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def _reset(module):
    """As torch's FSDP and others do: every part that can."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def _spoil(module):
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.fill_(123)


@EACH
def test_restores_what_construction_sets(make):
    """Parameters and buffers to the bit, from meta, twice."""
    torch.manual_seed(3)
    built = make()
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for _ in range(2):
        _spoil(module)
        torch.manual_seed(3)
        _reset(module)
        found, wanted = module.state_dict(), built.state_dict()
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            # parts of a layer, and shares, draw in another order
            if not (hasattr(module, "in_proj") or name.startswith(("1.", "2."))):
                assert torch.equal(x, wanted[name]), name
            assert (x != 123).any(), name


def test_a_layer_resets_its_parts():
    layer = MODULES["layer"]()
    _spoil(layer)
    layer.reset_parameters()
    for name, x in layer.state_dict().items():
        assert (x != 123).any(), name
    assert layer(torch.randn(1, 5, H * D)).isfinite().all()
    assert layer.feature_map.seed == 3


def test_seeds():
    """One that was given is given again, another is drawn anew; both count from 0."""
    for make, given in ((fastpe.Favor, {}), (lambda **o: fastpe.SineSPE(D, H, **o), {"seed": 7})):
        module = make(**given)
        before = module.seed
        for _ in range(3):
            module.maybe_resample_()
        assert module.step == 3
        module.reset_parameters()
        assert module.step == 0
        assert (module.seed == before) == bool(given)
    module.reseed_(9)
    module.reset_parameters()
    assert module.seed == 9


@EACH
def test_constructed_without_memory(make):
    """Under FakeTensorMode, which has no numbers to look at."""
    with FakeTensorMode():
        module = make()
        _reset(module)
        if isinstance(module, (CausalLinearAttention, LinearAttention)):
            assert module(torch.empty(2, 5, H * D)).shape == (2, 5, H * D)


def _deferred(group):
    """Meta construction, shards, memory, numbers: FSDP2's deferred initialisation."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    # that nn.Linear returns a view, and of random numbers in shards on the CPU
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message="DTensor random operators")
    # DTensor's own numbers would come from the generator of each rank
    torch.manual_seed(dist.get_rank(group))
    found, sff = [], {"num_levels": 2, "num_realizations": 8, "seed": 5}
    for encoding, psi in (
        (lambda: fastpe.RoPEPool(D, H, num_levels=2, apply="before"), fastpe.Hedgehog(D // 2, H)),
        (lambda: fastpe.FStripe(D, H, frequency=[0.1, 0.3], **sff), "elu1"),
        (lambda: fastpe.ConvSPE(D, H, kernel_size=3, seed=5), fastpe.Favor(8, seed=6)),
    ):
        with torch.device("meta"):
            layer = CausalLinearAttention(
                H * D, H, pos_encoding=encoding(), feature_map=copy.deepcopy(psi)
            ).to("meta")
        fully_shard(layer, mesh=DeviceMesh.from_group(group, "cpu"))
        layer.to_empty(device="cpu")
        _spoil(layer)
        _reset(layer)
        positions = None if layer.pos_encoding.num_levels == 1 else torch.randn(5, 2)
        y = layer(torch.randn(1, 5, H * D), positions=positions)
        y.sum().backward()
        layer.reshard()
        whole = {n: x.full_tensor() for n, x in layer.named_parameters()}
        found.append((whole, [x.clone() for x in layer.buffers()]))
    return found


def test_deferred_initialisation(ranks):
    rotated, sines, _ = zip(*ranks(2, _deferred), strict=True)
    theta = fastpe.RoPEPool(D, H, num_levels=2).theta
    for parameters, _ in rotated:
        assert torch.equal(parameters["pos_encoding.theta"], theta)
        assert torch.equal(parameters["feature_map.weight"], fastpe.Hedgehog(D // 2, H).weight)
        assert torch.equal(parameters["feature_map.bias"], torch.zeros(H, D // 2))
    # around -log(4) and log(1.5), as asked for
    for parameters, _ in sines:
        mean = parameters["pos_encoding.freqs"].mean((0, 1, 2))
        assert (mean - torch.tensor([-1.386, 0.405])).abs().max() < 5 / (H * D * 10) ** 0.5
    assert all(map(torch.equal, sines[0][1], sines[1][1]))
