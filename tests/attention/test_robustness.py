"""Threads, a million tokens, thousands of calls, saturated parameters."""

import gc
import os
import sys
import threading

import pytest
import torch
from conftest import encodings
from helpers import leaf, make_inputs

import fastpe
from fastpe import ConvSPE, Favor, Hedgehog, RoPE, SineSPE, causal_linear_attention
from fastpe import causal_linear_attention_step as attend_step

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


# saturated parameters (T16); those of SineSPE and F-StrIPE in test_encodings.py


def _finite(o, leaves):
    grads = torch.autograd.grad(o.square().sum(), leaves.values())
    for name, x in ("o", o), *zip(leaves, grads, strict=True):
        assert x.isfinite().all(), name


def _saturated(kind, value):
    """Return an encoding, a feature map, and the size of q and k."""
    if kind == "favor":
        return None, Favor(16, seed=1), value
    if kind == "hedgehog":
        psi = Hedgehog(6, 2)
        with torch.no_grad():
            psi.weight.mul_(value)
            psi.bias.fill_(value)
        return None, psi, 1.0
    make = {
        "conv-gate": lambda: ConvSPE(6, 2, kernel_size=5, num_realizations=8, seed=1),
        "conv-weights": lambda: ConvSPE(6, 2, kernel_size=5, num_realizations=8, seed=1),
        "gains": lambda: SineSPE(6, 2, num_sines=3, num_realizations=8, seed=1),
        "theta": lambda: RoPE(6, num_heads=2, learned=True),
    }
    encoding, feature_map = make[kind](), "elu1"
    names = {"conv-gate": ["gate"], "conv-weights": ["weight_q", "weight_k"]}.get(kind, [kind])
    with torch.no_grad():
        for name in names:
            getattr(encoding, name).fill_(value)
    return encoding, feature_map, 1.0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("conv-gate", 40),
        ("conv-gate", -40),
        ("conv-weights", 0),
        ("gains", 40),
        ("theta", 40),
        ("favor", 200),
        ("hedgehog", 200),
        ("hedgehog", 0),
    ],
)
def test_saturated(backend, kind, value):
    """T16: values and every gradient stay finite."""
    encoding, feature_map, size = _saturated(kind, value)
    q, k, v = make_inputs(1, 30, 2, 6, 4, torch.float32)
    leaves = {"q": leaf(size * q), "k": leaf(size * k), "v": leaf(v)}
    o = causal_linear_attention(
        *leaves.values(), pos_encoding=encoding, feature_map=feature_map, backend=backend
    )
    for module in (encoding, feature_map):
        if isinstance(module, torch.nn.Module):
            leaves |= dict(module.named_parameters())
    _finite(o, leaves)


# shapes at the edge (docs/math.md, "Tolerances"), with masks and packing


@pytest.mark.parametrize("make", encodings("-rope-vector", "-fstripe-vector"))
@pytest.mark.parametrize("d", [7, 8])
def test_nothing_to_attend_to(backend, make, d):
    """No sequence, empty ones, all padding: outputs are 0, gradients too, a state stays."""
    try:
        encoding = make(d, 2)
    except ValueError:
        pytest.skip("pairs need an even D")
    for (b, t), more in (
        ((1, 0), {"cu_seqlens": torch.zeros(1, dtype=torch.int64)}),
        ((1, 0), {"cu_seqlens": torch.zeros(4, dtype=torch.int32)}),
        ((0, 5), {"key_padding_mask": torch.ones(0, 5, dtype=torch.bool)}),
        ((2, 0), {"key_padding_mask": torch.ones(2, 0, dtype=torch.bool)}),
        ((2, 1), {"key_padding_mask": torch.ones(2, 1, dtype=torch.bool)}),
        ((2, 5), {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}),
    ):
        q, k, v = (leaf(x) for x in make_inputs(b, t, 2, d, 3, torch.float32))
        options = {"pos_encoding": encoding, "backend": backend, "output_final_state": True} | more
        o, state = causal_linear_attention(q, k, v, **options)
        assert o.shape == v.shape
        assert not o.any()
        assert not state.s.any()
        assert not state.z.any()
        filled = state._replace(s=torch.ones_like(state.s), z=torch.ones_like(state.z))
        o, after = causal_linear_attention(q, k, v, initial_state=filled, **options)
        assert not o.any()
        assert torch.equal(after.s, filled.s)
        assert torch.equal(after.z, filled.z)
        for g in torch.autograd.grad(o.sum() + after.s.sum(), (q, k, v)):
            assert not g.any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
            "cu_seqlens must begin with 0, never fall, and end with T = 5",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9])},
            "cu_seqlens must begin with 0, never fall, and end with T = 5",
        ),
        (
            {"cu_seqlens": torch.tensor([-1, 5])},
            "cu_seqlens must begin with 0, never fall, and end with T = 5",
        ),
        (
            {"cu_seqlens": torch.tensor([0])},
            "cu_seqlens must begin with 0, never fall, and end with T = 5",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2**40])},
            "cu_seqlens must begin with 0, never fall, and end with T = 5",
        ),
        ({"key_padding_mask": torch.zeros(5, 1, dtype=torch.bool)}, "key_padding_mask must be"),
    ],
)
def test_malformed_sequences(backend, more, message, monkeypatch):
    """Refused before a kernel is called."""
    monkeypatch.setattr(fastpe.backends.native.library.Library, "run", None)
    q, k, v = make_inputs(1, 5, 2, 8, 3, torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_linear_attention(q, k, v, pos_encoding=RoPE(8), backend=backend, **more)


# threads


def _threaded(functions):
    """Run functions at the same time, each in a thread of its own; raise what they raise."""
    errors, start = [], threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(f,)) for f in functions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("make", encodings("rope", "sinespe", "convspe", "fstripe-pooled"))
def test_threads_have_the_results_of_one(native_kernels, threads, make, shared):
    """Lengths and dtypes differ between the threads, so that caches of a shared module do too."""
    threads(2)
    first = make(8, 2).eval()
    modules = [first, first if shared else make(8, 2).eval()]
    inputs = [make_inputs(2, t, 2, 8, 6, torch.float32, seed=t) for t in (33, 47)]

    def once(i):
        with torch.no_grad():
            o, state = causal_linear_attention(
                *inputs[i], pos_encoding=modules[i], output_final_state=True, backend=native_kernels
            )
            token = (x[:, 0] for x in inputs[i])
            return o, *attend_step(*token, state, pos_encoding=modules[i])[1][:2]

    alone = [once(0), once(1)]

    def again(i):
        for _ in range(150):
            assert all(map(torch.equal, once(i), alone[i]))

    _threaded([lambda: again(0), lambda: again(1)])


def test_training_in_threads(native_kernels, threads):
    """Forward and backward of two models at the same time."""
    threads(2)
    models = [
        fastpe.nn.CausalLinearAttention(16, 2, pos_encoding=SineSPE(8, 2, seed=i)) for i in (1, 2)
    ]
    x = torch.randn(2, 40, 16)

    def once(i):
        models[i].eval()
        models[i].zero_grad()
        models[i](x).square().sum().backward()
        return [p.grad.clone() for p in models[i].parameters()]

    alone = [once(0), once(1)]

    def again(i):
        for _ in range(100):
            assert all(map(torch.equal, once(i), alone[i]))

    _threaded([lambda: again(0), lambda: again(1)])


# memory


def _resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _use(t, make, backend):
    """Forward, backward, steps, with padding and packing, at a length of its own."""
    encoding = make(8, 2)
    q, k, v = (leaf(x) for x in make_inputs(2, t, 2, 8, 6, torch.float32))
    mask = torch.zeros(2, t, dtype=torch.bool)
    mask[0, t // 2 :] = True
    options = {"pos_encoding": encoding, "output_final_state": True, "backend": backend}
    o, state = causal_linear_attention(q, k, v, key_padding_mask=mask, **options)
    packed, _ = causal_linear_attention(
        *(x[:1] for x in (q, k, v)), cu_seqlens=torch.tensor([0, t // 3, t]), **options
    )
    (o.sum() + packed.sum()).backward()
    with torch.no_grad():
        for i in range(2):
            token = (x[:, i] for x in (q, k, v))
            _, state = attend_step(*token, state, pos_encoding=encoding, backend=backend)


@linux
@pytest.mark.parametrize("make", encodings("rope", "sinespe"))
def test_no_leak(native_kernels, make):
    """A thousand calls, each of another module: a page for ten of them at the most."""

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    # the allocator's arenas have their size by then
    for i in range(300):
        _use(3 + i % 50, make, native_kernels)
    count, grown = tensors(), []
    # the allocator may grow once, for what other tests left behind; a leak grows each time
    for _ in range(3):
        before = _resident()
        for i in range(1000):
            _use(3 + i % 50, make, native_kernels)
        assert tensors() <= count
        grown.append(_resident() - before)
        if grown[-1] < 100 * os.sysconf("SC_PAGE_SIZE"):
            return
    pytest.fail(f"each thousand calls took more memory, in bytes: {grown}")
