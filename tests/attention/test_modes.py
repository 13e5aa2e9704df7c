"""What may stand around a call: device contexts, tracing, transforms, checkpoints, copies."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import encodings
from helpers import Fade, assert_within, make_inputs, traced
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastpe import RoPE, RoPEPool, SineSPE, causal_linear_attention
from fastpe.nn import CausalLinearAttention

# torch's own derivatives are made with it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

Q, K, V = make_inputs(2, 9, 3, 8, 6, torch.float32)


# in a process of its own: the patched torch.empty of the tests is not one that contexts know
META = """
import torch
from fastpe import FStripe, RoPE, RoPEPool, SineSPE, causal_linear_attention

q, k, v = torch.randn(3, 2, 9, 3, 8)


def run(encoding):
    leaf = q.clone().requires_grad_()
    o = causal_linear_attention(leaf, k, v, pos_encoding=encoding, backend="cpu")
    learned = [] if encoding is None else list(encoding.parameters())
    return [o, *torch.autograd.grad(o.sum(), [leaf, *learned])]


for encoding in (None, RoPE(8), RoPEPool(8, 3), SineSPE(8, 3), FStripe(8, 3)):
    expected = run(encoding)
    with torch.device("meta"):
        actual = run(encoding)
    assert all(map(torch.equal, actual, expected))

with torch.device("meta"):
    rope, pool, spe = RoPE(8), RoPEPool(8, 3), SineSPE(8, 3)
assert torch.equal(run(rope)[0], run(RoPE(8))[0])
assert {p.device.type for p in (*pool.parameters(), *spe.parameters())} == {"meta"}
"""


def test_default_device(native_kernels):
    """Outputs are where inputs are, whatever the default; fixed frequencies are on the CPU."""
    subprocess.run([sys.executable, "-W", "error", "-c", META], check=True, timeout=120)


@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_forward_derivatives_are_never_dropped(backend, make):
    """The reference has them, kernels say that they have not."""
    encoding = make(8, 3)
    with torch.no_grad(), forward_ad.dual_level():
        causal_linear_attention(Q, K, V, pos_encoding=encoding, backend=backend)
        q = forward_ad.make_dual(Q, torch.ones_like(Q))
        if backend != "reference":
            with pytest.raises(RuntimeError, match="jvp"):
                causal_linear_attention(q, K, V, pos_encoding=encoding, backend=backend)
            return
        o = causal_linear_attention(q, K, V, pos_encoding=encoding, backend=backend)
        tangent = forward_ad.unpack_dual(o).tangent
    step = 1e-4
    ends = [
        causal_linear_attention(
            *(x.double() for x in (Q + sign * step, K, V)),
            pos_encoding=None if encoding is None else copy.deepcopy(encoding).double(),
            backend=backend,
        )
        for sign in (1, -1)
    ]
    assert_within(tangent, (ends[0] - ends[1]) / (2 * step), 1e-2)


def test_forward_derivatives_of_frequencies():
    """A map kept from before has none, so it is made anew."""
    encoding = RoPEPool(8, 3)
    with torch.no_grad():
        causal_linear_attention(Q, K, V, pos_encoding=encoding, backend="reference")
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(encoding.theta, torch.ones_like(encoding.theta))
            del encoding.theta
            encoding.theta = dual
            o = causal_linear_attention(Q, K, V, pos_encoding=encoding, backend="reference")
            assert forward_ad.unpack_dual(o).tangent.abs().max() > 0


@pytest.mark.filterwarnings("ignore")
def test_traced_by_jit(backend):
    def run(q):
        return causal_linear_attention(q, K, V, pos_encoding=None, backend=backend)

    with torch.no_grad():
        trace = torch.jit.trace(run, Q, check_trace=False)
        assert torch.equal(trace(2 * Q), run(2 * Q))


def test_vmap():
    """Over the reference; kernels refuse."""
    q = torch.stack((Q, 2 * Q))
    encoding = RoPEPool(8, 3)

    def run(backend):
        return lambda q: causal_linear_attention(q, K, V, pos_encoding=encoding, backend=backend)

    with torch.no_grad():
        expected = torch.stack([run("reference")(x) for x in q])
        assert_within(torch.func.vmap(run("reference"))(q), expected, 1e-6)


def test_kernels_refuse_vmap(kernels):
    with torch.no_grad(), pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda q: causal_linear_attention(q, K, V, backend=kernels))(Q[None])


def _layer():
    torch.manual_seed(0)
    encoding = SineSPE(4, 3, num_sines=2, num_realizations=8, seed=1)
    return CausalLinearAttention(12, 3, pos_encoding=encoding)


@traced
def test_checkpoint_and_compile(compiled):
    """Compiled around a checkpoint noise stays; inside, where it cannot, that is said."""
    x = torch.randn(2, 9, 12, requires_grad=True)

    def run(function):
        return torch.autograd.grad(function(x).square().sum(), x)[0]

    expected, layer = run(_layer()), _layer()
    around = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")
    assert_within(run(around), expected, 1e-5)
    inside = compiled(_layer())
    with pytest.raises(RuntimeError, match="compile around the checkpoint"):
        run(lambda x: checkpoint(inside, x, use_reentrant=False))


@traced
def test_compiled_checks(compiled):
    """What eager code refuses by its value is refused when compiled code runs."""
    encoding = SineSPE(8, 3, num_sines=2, num_realizations=8, seed=1)
    options = {"pos_encoding": encoding, "output_final_state": True}
    with torch.no_grad():
        state = causal_linear_attention(Q, K, V, **options)[1]

    @compiled
    def run(q, positions):
        return causal_linear_attention(
            q, K, V, positions=positions, initial_state=state, **options
        )[0]

    positions = torch.arange(9.0)
    run(Q, positions)
    with pytest.raises(RuntimeError, match="positions must be finite"):
        run(Q, positions * float("nan"))
    encoding.resample_()
    with pytest.raises(RuntimeError, match=r"another .* of noise"):
        run(Q, positions)


class _Buffered(RoPE):
    """A level-1 encoding whose map depends on a buffer."""

    def __init__(self):
        super().__init__(8)
        self.register_buffer("speed", torch.ones(()))

    def map_inputs(self):
        return [*super().map_inputs(), *self.buffers()]

    def make_maps(self, device=None):
        rotation = super().make_maps(device)[0]
        rotation = rotation._replace(freq=rotation.freq * self.speed)
        return rotation, rotation


def test_changed_buffers_are_seen(backend):
    encoding = _Buffered()
    with torch.no_grad():
        before = causal_linear_attention(Q, K, V, pos_encoding=encoding, backend=backend)
        encoding.speed.fill_(3.0)
        after = causal_linear_attention(Q, K, V, pos_encoding=encoding, backend=backend)
    wanted = causal_linear_attention(
        Q, K, V, pos_encoding=RoPE(8), positions=3 * torch.arange(9), backend=backend
    )
    assert not torch.equal(after, before)
    assert_within(after, wanted, 1e-6)


class _Wrong(Fade):
    """An encoding whose features are not what it says."""

    wrong = staticmethod(lambda y: y[:, :1])

    def features(self, x, positions, side):
        y = super().features(x, positions, side)
        return type(self).wrong(y) if side == "k" else y


@pytest.mark.parametrize("wrong", [lambda y: y[:, :1], lambda y: y[..., :4], lambda y: None])
def test_features_of_another_shape_are_refused(backend, wrong, monkeypatch):
    monkeypatch.setattr(_Wrong, "wrong", staticmethod(wrong))
    with pytest.raises(ValueError, match=r"features must return \(2, 9, 3, 8\)"):
        causal_linear_attention(Q, K, V, pos_encoding=_Wrong(8, 3), backend=backend)


def test_features_of_another_dtype_are_cast(backend, monkeypatch):
    monkeypatch.setattr(_Wrong, "wrong", staticmethod(lambda y: y.double()))
    options = {"output_final_state": True, "backend": backend}
    o, state = causal_linear_attention(Q, K, V, pos_encoding=_Wrong(8, 3), **options)
    assert torch.equal(o, causal_linear_attention(Q, K, V, pos_encoding=Fade(8, 3), **options)[0])
    assert state.s.dtype == torch.float32


@pytest.mark.parametrize("make", encodings("rope-learned", "sinespe", "fstripe-pooled"))
def test_copies_hold_no_caches(make):
    """What can be made again is neither pickled nor copied."""
    encoding = make(8, 3).eval()
    size = len(pickle.dumps(encoding))
    with torch.no_grad():
        o = causal_linear_attention(Q, K, V, pos_encoding=encoding)
    assert len(pickle.dumps(encoding)) < size + 500
    file = io.BytesIO()
    torch.save(encoding, file)
    file.seek(0)
    for again in (copy.deepcopy(encoding), torch.load(file, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(causal_linear_attention(Q, K, V, pos_encoding=again), o)
