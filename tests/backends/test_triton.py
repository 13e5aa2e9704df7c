"""What is the Triton backend's own: its launches, its check of the compiler, its refusals."""

import contextlib

import pytest
import torch
from helpers import make_inputs

import fastpe
from fastpe import backends

if fastpe.available_backends()["triton"] is not None:
    reason = fastpe.available_backends()["triton"]
    pytest.skip(f"backend 'triton' is not available: {reason}", allow_module_level=True)

from fastpe.backends import triton as backend
from fastpe.backends.native import cuda
from fastpe.backends.triton import causal_dot_launch, common
from fastpe.backends.triton.blocks import blocks
from fastpe.backends.triton.causal_dot import slots_kernel
from fastpe.backends.triton.common import power

# bytes of shared memory for one program
L4, A100, H100 = 99 << 10, 163 << 10, 227 << 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_sound_compiler_passes():
    assert backend.miscompiled(DEVICE) is None


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_gradient_is_seen(monkeypatch, wrong):
    """One number in ten off by a half, as where a warp has written over another's rows."""

    def backward(*args):
        grads = causal_dot_launch.causal_dot_backward(*args)
        grads[wrong].flatten()[::10] *= 1.5
        return grads

    monkeypatch.setattr(backend, "causal_dot_backward", backward)
    found = backend.miscompiled(DEVICE)
    assert f"miscompiles the gradient of {'qkv'[wrong]} for this card" in found


def test_wider_heads_are_refused():
    q, k, v = make_inputs(1, 3, 1, 260, 8, torch.float32)
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    with pytest.raises(ValueError, match="backend 'triton' takes D, R and E up to 256, got 260"):
        fastpe.causal_linear_attention(q, k, v, backend="triton")


def test_tensors_elsewhere_are_refused():
    q, k, v = (x.to("meta") for x in make_inputs(1, 3, 1, 8, 8, torch.float32))
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a CUDA device, got m"):
        fastpe.causal_linear_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("t", [0, 1, 15, 64, 65, 1000, 4097])
@pytest.mark.parametrize("programs", [1, 7, 64, 5000])
def test_segments_cover_every_token_once(programs, t):
    length, count = causal_dot_launch.segments(programs, t, 32, 1, 132)
    assert length % 32 == 0
    assert (count - 1) * length < max(t, 1) <= count * length
    # a card that is full is given no more work
    assert count == 1 or programs < 2 * 132


@pytest.mark.parametrize("sequences", [1, 3, 130])
def test_slots_hold_every_segment_once(sequences):
    """Whatever the order and the lengths of the sequences, and gaps between them."""
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(0, 60, (sequences, 2), generator=generator)  # of a gap and a sequence
    lengths[1:2, 1] = 0
    ranges = lengths.flatten().cumsum(0).reshape(-1, 2)
    ranges = ranges[torch.randperm(sequences, generator=generator)]
    length, t = 16, int(ranges.max()) + 5
    slots = torch.full((sequences - 1 + -(-t // length), 6), -1)
    constants = {"num_warps": 1, "num_stages": 1}
    common.Kernel(slots_kernel, constants)(
        (len(slots), 1, 1), (ranges.to(DEVICE), slots := slots.to(DEVICE)), (sequences, length)
    )
    expected = []
    for i, (first, last) in enumerate(ranges.tolist()):
        begins = list(range(first, last, length)) or [first]
        for begin in begins:
            end, closes = min(begin + length, last), begin == begins[-1]
            slot = i if begin == first else sequences - 1 + begin // length
            alone = begin if closes else end, begin if begin == first else end
            expected.append((slot, begin, end, i, int(closes), *alone))
    found = [(i, *row) for i, row in enumerate(slots.tolist())]
    assert set(expected) <= set(found)
    # the others have no token and write no state
    taken = {row[0] for row in expected}
    assert len(taken) == len(expected)
    assert all(row[1] == row[2] and not row[4] for row in found if row[0] not in taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("width", "e"), [(1, 1), (32, 64), (64, 64), (48, 200), (128, 256)])
def test_blocks_hold_what_each_kernel_needs(width, e, parts, dtype):
    """All features in one block for what sums over them, all values for what sums over those."""
    for role in ("forward", "state", "grad_q", "grad_k", "grad_v"):
        block = blocks(role, width, e, parts, dtype, H100)
        if role in ("forward", "state", "grad_v"):
            assert block.bw >= width
        if role in ("grad_q", "grad_k"):
            assert block.be >= e
        assert min(block.c, block.bw, block.be) >= 16
    assert blocks("forward", width, e, parts, dtype, H100, chunk=16).c == 16


@pytest.mark.parametrize("width", [129, 200, 256])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("role", ["forward", "state", "grad_q", "grad_k", "grad_v"])
def test_wide_rows_of_float32_fit_small_cards(role, parts, width):
    """In 99 KB (A10, L4, 4090, 5090); scripts/aot_check.py compares with what is compiled."""
    for shared in (L4, A100, H100):
        block = blocks(role, -(-width // parts), 256, parts, torch.float32, shared)
        # two operands of a product, a large and a small part of each, and what they are made of;
        # a load ahead brings both again, and values
        tile = 4 * block.c * power(width)
        needed = 6 * tile if block.stages == 1 else 8 * tile + 4 * block.c * 33
        assert needed <= shared
    # and lose nothing where there is room
    assert block.stages == 2 or (role == "grad_q" and parts == 2)


def test_a_card_with_too_little_memory_is_refused(monkeypatch):
    """By name with the reason, not by an error at launch."""
    monkeypatch.setattr(common, "card", lambda device: common.Card(40, 64 << 10))
    q, k, v = (x.to(DEVICE) for x in make_inputs(1, 3, 1, 200, 8, torch.float32))
    with pytest.raises(ValueError, match=r"E = 200, 200, 8 of torch\.float32 on cards w"):
        fastpe.causal_linear_attention(q, k, v, backend="triton")
    for dtype, d in ((torch.float32, 128), (torch.bfloat16, 256)):
        assert backend.unsupported(DEVICE, dtype, (d, d, d)) is None
    small, large = (lambda device: common.Card(58, L4)), (lambda device: common.Card(108, A100))
    for found, dtype, d, fits in (
        (small, torch.float32, 256, True),
        (small, torch.float64, 128, True),
        (small, torch.float64, 129, False),
        (large, torch.float64, 128, True),
        (large, torch.float64, 256, False),
    ):
        monkeypatch.setattr(common, "card", found)
        assert (backend.unsupported(DEVICE, dtype, (d, d, 64)) is None) == fits


@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_one_stage_for_pairs_of_float32(d):
    """With two, Triton 3.6.0 cannot compile grad_q for RoPE(apply="before") and a normaliser."""
    block = blocks("grad_q", d // 2, d, 2, torch.float32, H100)
    assert block.stages == (1 if block.bw == 16 else 2)


class _Jitted:
    """Stands for a jitted function: compiles, and notes how often and what is launched."""

    arg_names = ("x", "n", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **meta):
            self.compiled += 1
            return _Compiled(self, args, meta)

        return compile_and_launch


class _Compiled:
    def __init__(self, function, args, meta):
        self.function = function

    def __getitem__(self, grid):
        return lambda *args: self.function.launched.append((grid, args))


def test_code_is_looked_up_once_for_equal_arguments(monkeypatch):
    """Other types, sizes or alignments are other code; other tensors are not."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    function = _Jitted()
    kernel = common.Kernel(function, {"BLOCK": 64, "num_warps": 4})
    x, y = (torch.arange(64.0)[:32] for _ in range(2))
    kernel((3, 1, 1), (x,), (32,))
    kernel((5, 1, 1), (y,), (32,))
    assert function.compiled == 1
    assert function.launched == [((5, 1, 1), (y, 32, 64))]
    kernel((3, 1, 1), (x,), (31,))
    kernel((3, 1, 1), (x[1:],), (32,))
    kernel((3, 1, 1), (x.double(),), (32,))
    assert function.compiled == 4


@pytest.fixture
def card(monkeypatch):
    """What torch says of two cards that are not there; the check of the compiler is the test's."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "_reasons", {})
    return [torch.device("cuda", i) for i in range(2)]


PASSING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_what_may_pass_is_not_remembered(card, monkeypatch, error):
    """The error is the caller's; the next call checks again."""

    def check(device):
        raise error

    monkeypatch.setattr(backend, "miscompiled", check)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error).split("[")[0]):
            backends.unavailable("triton", card[0])
    assert fastpe.available_backends()["triton"] == f"not known now: {error}"
    monkeypatch.setattr(backend, "miscompiled", lambda device: None)
    assert backends.unavailable("triton", card[0]) is None


def test_show_config_while_a_check_cannot_run(card, monkeypatch, capsys):
    def check(device):
        raise PASSING[0]

    monkeypatch.setattr(backend, "miscompiled", check)
    # there is no card that a CUDA library, if it is built, could name
    monkeypatch.setattr(backends.load("cuda"), "unavailable", lambda device: "not in this test")
    fastpe.show_config()
    out = capsys.readouterr().out
    assert f"triton     unavailable: not known now: {PASSING[0]}" in out
    assert f"auto       not known now: {PASSING[0]} for tensors on a GPU" in out


def test_every_card_has_a_verdict_of_its_own(card, monkeypatch):
    asked = []

    def check(device):
        asked.append(device)
        if device.index == 1:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(backend, "miscompiled", check)
    for _ in range(2):
        assert backends.unavailable("triton", card[0]) is None
        assert "cannot compile for this card: Pass" in backends.unavailable("triton", card[1])
        # the current card's
        assert backends.unavailable("triton") is None
    assert asked == card


def test_first_call_in_a_capture_is_refused(card, monkeypatch):
    """The check would break the graph that is being recorded; made before, it is not made again."""
    checked = []
    monkeypatch.setattr(backend, "miscompiled", checked.append)
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for name in ("triton", "auto"):
            with pytest.raises(RuntimeError, match="call once before capture"):
                backends.resolve(name, card[0], torch.float32, (64, 64, 64))
    assert not checked
    for _ in range(2):
        assert backends.resolve("auto", card[0], torch.float32, (64, 64, 64)) == "triton"
    assert checked == card[:1]


def _usual(index=0):
    return torch.device("cuda", index), torch.float32, (64, 64, 64)


def test_resolve_names_the_reason_once(monkeypatch):
    """`auto` says why it leaves a card to the reference, once for each reason."""
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "unavailable", lambda name, device: "no card")
    with pytest.warns(RuntimeWarning, match="reference on cuda, which is slower: triton no card"):
        assert backends.resolve("auto", *_usual()) == "reference"
    assert backends.resolve("auto", *_usual()) == "reference"


def test_another_backend_in_place_of_the_usual_one_is_said_once(monkeypatch):
    """The CUDA library takes over where the check failed: not for sizes, nor for a step."""
    lacking = {"triton": "miscompiles", "cuda": None}
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "unavailable", lambda name, device: lacking[name])
    monkeypatch.setattr(cuda, "unsupported", lambda *sizes: None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    message = "uses backend 'cuda' on cuda:0: 'triton' is not available there, miscompiles"
    with pytest.warns(RuntimeWarning, match=message):
        assert backends.resolve("auto", *_usual()) == "cuda"
    assert backends.resolve("auto", *_usual()) == "cuda"
    with pytest.warns(RuntimeWarning, match="on cuda:1"):
        assert backends.resolve("auto", *_usual(1)) == "cuda"
    lacking["triton"] = None
    assert backends.resolve("auto", *_usual()[:2], (300, 300, 64)) == "cuda"
    # one launch for a token, if there is a library
    assert backends.resolve("auto", *_usual(), one_token=True) == "cuda"
    lacking["cuda"] = "was not built"
    assert backends.resolve("auto", *_usual(), one_token=True) == "triton"
