"""What is kept from one call to the next has nothing of that call's mode or device."""

import copy
import io

import pytest
import torch
from conftest import encodings
from helpers import assert_within, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpe import ConvSPE, Favor, RoPE, RoPEPool, SineSPE, causal_linear_attention
from fastpe.nn import CausalLinearAttention

Q, K, V = make_inputs(2, 5, 3, 8, 6, torch.float32)
FIXED = pytest.mark.parametrize(
    "make", [lambda: RoPE(8), lambda: RoPEPool(8, per_head=False, learned=False)]
)


def _tensors(x, seen):
    """Yield the tensors in the attributes of a module, however deep, parameters left out."""
    if id(x) in seen:
        return
    seen[id(x)] = x
    if isinstance(x, torch.Tensor):
        if not isinstance(x, torch.nn.Parameter):
            yield x
        return
    if isinstance(x, dict):
        parts = x.values()
    elif isinstance(x, (tuple, list)):
        parts = x
    else:
        parts = getattr(x, "__dict__", {}).values() if "fastpe" in type(x).__module__ else ()
    for part in parts:
        yield from _tensors(part, seen)


def _attend(encoding, feature_map, q=Q):
    options = {"pos_encoding": encoding, "feature_map": feature_map}
    state = causal_linear_attention(q, K, V, output_final_state=True, **options)[1]
    return causal_linear_attention(q[:, :1], K[:, :1], V[:, :1], initial_state=state, **options)


@pytest.mark.parametrize("psi", ["elu1", "favor"])
@pytest.mark.parametrize(
    "make", encodings("rope-before", "ropepool", "sinespe", "convspe", "fstripe-pooled")
)
def test_nothing_of_inference_mode_is_kept(make, psi):
    encoding, feature_map = make(8, 3), Favor(16, seed=1) if psi == "favor" else psi
    if psi == "favor" and isinstance(encoding, RoPEPool):
        encoding = RoPEPool(8, 3, apply="before")
    with torch.inference_mode():
        before = _attend(encoding, feature_map)
    for part in (encoding, feature_map):
        assert not any(x.is_inference() for x in _tensors(part, {}))
    q = Q.clone().requires_grad_()
    o = _attend(encoding, feature_map, q)
    o.sum().backward()
    assert_within(o, before, 1e-6)


@FIXED
def test_table_of_another_device(make):
    """Meta stands for a card: the scan saves its table for the backward."""
    encoding, meta = make(), torch.device("meta")
    with torch.inference_mode():
        encoding.frequencies(meta)
    table = encoding.frequencies(meta)
    assert not table.is_inference()
    assert table.device == meta
    assert encoding.frequencies(meta) is table
    assert encoding.to("meta").frequencies(meta) is table
    assert meta in make().to("meta")._cycles


@FIXED
def test_table_is_not_moved_by_a_file(make):
    encoding, file = make(), io.BytesIO()
    torch.save(encoding, file)
    file.seek(0)
    for again in (
        torch.load(file, map_location="meta", weights_only=False),
        copy.deepcopy(encoding).to("meta"),
        copy.deepcopy(encoding).to_empty(device="meta"),
    ):
        assert torch.equal(again.frequencies(), encoding.frequencies())


@FIXED
def test_nothing_of_a_fake_mode_is_kept(make):
    with FakeTensorMode():
        encoding = make()
        encoding.frequencies()
    assert torch.equal(encoding.frequencies(), make().frequencies())


def test_fake_noise_is_not_kept():
    encoding = SineSPE(8, 3, num_realizations=8, seed=1).eval()
    wanted = encoding.make_maps()[0].noise
    encoding = copy.deepcopy(encoding)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        encoding.make_maps()
    assert torch.equal(encoding.make_maps()[0].noise, wanted)


def test_noise_of_single_tokens_follows_the_device():
    """Where the noise is made is part of what it is kept by."""
    encoding = ConvSPE(8, 3, kernel_size=3, num_realizations=8, seed=1).eval()
    with torch.no_grad():
        _attend(encoding, "elu1")
    key, tiles = encoding._kept._known
    assert tiles
    assert encoding.noise_key.device in key


def test_keys_of_other_buffers():
    """On meta, as on a card, nothing is looked at; other tensors may get the ids of old ones."""
    encoding = SineSPE(8, 3, num_realizations=8, seed=1).to("meta")
    name, like = next(iter(encoding.named_buffers()))
    seen = []
    for _ in range(5):
        seen.append(encoding.noise_key)
        assert encoding.noise_key is seen[-1]
        for _ in range(2):
            setattr(encoding, name, torch.empty_like(like, device="meta"))
        assert all(encoding.noise_key is not x for x in seen)


def test_keys_of_inference_buffers():
    """Their versions are not counted."""
    with torch.inference_mode():
        encoding = SineSPE(8, 3, num_realizations=8, seed=1).to("meta")
        before = encoding.noise_key
        encoding.resample_()
        assert encoding.noise_key is not before


def test_training_after_a_look_in_inference_mode(backend):
    layer = CausalLinearAttention(24, 3, pos_encoding=RoPE(8), backend=backend)
    x = torch.randn(2, 5, 24)
    with torch.inference_mode():
        before = layer.eval()(x)
    after = layer.train()(x)
    after.sum().backward()
    assert torch.equal(before, after)
