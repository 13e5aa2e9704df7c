"""The CUDA kernels without a card, as loops on the CPU (csrc/cuda/block.h), and the backend."""

import sys

import pytest
import torch
from conftest import encodings
from helpers import Problem, assert_within, leaf, make_inputs

import fastpe
from fastpe import causal_linear_attention, causal_linear_attention_step
from fastpe.backends import native
from fastpe.backends.native import cuda
from fastpe.backends.specs import ScanOptions
from fastpe.ops.causal_dot import causal_dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    encodings("none", "rope-vector", "ropepool", "rope-before", "sinespe", "fstripe-pooled"),
)
def test_no_race(cuda_host, cuda_host_backwards, make, dtype, monkeypatch):
    """What threads do at one time gives the same bits in the opposite order."""
    found = []
    for library in (cuda_host, cuda_host_backwards):
        monkeypatch.setitem(native.libraries, "cpu", library)
        case = Problem(make(20, 2), dtype, shape=(2, 150, 2), d=20, e=70)
        q, k, v = (x[:, 0] for x in (case.q, case.k, case.v))
        positions = None if case.positions is None else case.positions[:, 0]
        if case.levels == 1 and positions is not None:
            positions = positions[:, 0]
        with torch.no_grad():
            o, state = causal_linear_attention_step(
                q, k, v, case.state, pos_encoding=case.encoding, positions=positions, backend="cpu"
            )
        found.append(case.run("cpu") | {"step o": o, "step s": state.s, "step z": state.z})
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_race_of_ranges_and_shared_heads(cuda_host, cuda_host_backwards, dtype, monkeypatch):
    """The same of sequences in one row, one of them empty, whose heads share keys and values."""
    options = ScanOptions("elu1", "sum", 1e-6, True, False, True, 1.0, 0, "cpu")
    ranges = torch.tensor([[3, 100], [100, 100], [101, 150]])
    (q, *_), (_, k, v) = (make_inputs(1, 150, h, 20, 70, dtype) for h in (4, 2))
    s0, z0 = torch.randn(3, 2, 20, 70), torch.rand(3, 2, 20)
    positions, freq = torch.rand(1, 150, 2).double(), torch.rand(1, 10, 2).double()
    found = []
    for library in (cuda_host, cuda_host_backwards):
        monkeypatch.setitem(native.libraries, "cpu", library)
        leaves = [leaf(x) for x in (q, k, v, s0, z0, positions, freq)]
        scanned = causal_dot(*leaves, ranges, options=options)
        grads = torch.autograd.grad(sum(x.square().sum() for x in scanned), leaves)
        stepped = native.step(q[:, :1], k[:, :1], v[:, :1], s0[:1], z0[:1], None, None, options)
        found.append([*scanned, *grads, *stepped])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normalizer_is_not_rounded(cuda_host, dtype, monkeypatch):
    """Products take operands of half precision; the sums of keys and of weights do not."""
    monkeypatch.setitem(native.libraries, "cpu", cuda_host)
    q, k, v = make_inputs(2, 150, 2, 20, 12, dtype)
    options = ScanOptions("elu1", "sum", 1e-6, False, False, True, 1.0, 0, "cpu")
    _, den, _, z = torch.ops.fastpe.causal_dot(q, k, v, None, None, None, None, None, *options)
    psi = [torch.where(x > 0, x + 1, x.exp()) for x in (q.double(), k.double())]
    assert_within(z, psi[1].sum(1), 1e-6)
    assert_within(den, torch.einsum("bthd,bthd->bht", psi[0], psi[1].cumsum(1)), 1e-6)


def test_columns_are_shared_out_without_a_difference(cuda_host, monkeypatch):
    """Few heads have their columns cut finer (csrc/cuda/kernels.cu): the bits stay."""
    monkeypatch.setitem(native.libraries, "cpu", cuda_host)
    q, k, v = make_inputs(1, 80, 64, 24, 64, torch.float32)

    def run(heads):
        leaves = [x[:, :, heads].clone().requires_grad_() for x in (q, k, v)]
        o = causal_linear_attention(*leaves, pos_encoding=fastpe.RoPE(24), backend="cpu")
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    for one, all_of_them in zip(run(slice(3, 4)), run(slice(None)), strict=True):
        assert torch.equal(one, all_of_them[:, :, 3:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_card_has_the_memory(cuda_host, dtype, monkeypatch):
    """Head sizes up to 256 fit in 99 KiB of shared memory, which compute capability 8.0 has."""
    monkeypatch.setattr(native.library, "CUDA", cuda_host)
    for widths in [(16, 16, 16), (64, 32, 64), (100, 100, 1), (128, 128, 300), (256, 256, 256)]:
        assert native.shared_memory(dtype, widths) <= 99 << 10


def test_library_is_of_this_version(cuda_host):
    assert cuda_host.unavailable() is None


def test_needs_a_card(cuda_host, monkeypatch):
    assert cuda.unsupported(torch.device("cpu"), torch.float32, (8, 8, 8)) == (
        "needs tensors on a CUDA device, got cpu"
    )
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    monkeypatch.setattr(cuda, "CUDA", cuda_host)
    assert cuda.unavailable(torch.device("cuda", 0)) == "torch finds no CUDA device"


@pytest.mark.gpu
def test_head_sizes_beyond_the_card():
    if fastpe.available_backends()["cuda"] is not None:
        pytest.skip("backend 'cuda' is not available: the refusal of large heads was not checked")
    q, k, v = (x.cuda() for x in make_inputs(1, 4, 1, 4000, 8))
    with pytest.raises(ValueError, match="D = 4000, R = 4000, E = 8"):
        causal_linear_attention(q, k, v, backend="cuda")


def test_a_step_without_room_takes_several_calls(cuda_host, monkeypatch):
    """Sines of a token that no block can hold: features first, then the scan."""
    monkeypatch.setitem(native.libraries, "cpu", cuda_host)
    encoding = fastpe.FStripe(20, 2, num_sines=3)
    case = Problem(encoding, torch.float32, shape=(2, 1, 2), d=20)
    options = {"pos_encoding": encoding, "positions": case.positions, "initial_state": case.state}
    with torch.no_grad():
        in_one = causal_linear_attention(case.q, case.k, case.v, backend="cpu", **options)
        monkeypatch.setattr(sys.modules[native.step.__module__], "_STEP_ROOM", 0)
        maps = encoding.make_maps()
        assert native.step(case.q, case.k, case.v, None, None, None, maps, None) is None
        several = causal_linear_attention(case.q, case.k, case.v, backend="cpu", **options)
    assert_within(in_one, several, 1e-5)
