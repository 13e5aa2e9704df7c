"""Kernels take addresses: every tensor that they are given is on one device, or named."""

import pytest
import torch
from helpers import make_inputs

import fastpe
from fastpe import backends
from fastpe.backends import tensors
from fastpe.backends.specs import Rotation, ScanOptions, SineMap

OPTIONS = ScanOptions("elu1", "sum", 1e-6, True, False, False, 1.0, 0, "")


def _scan():
    q, k, v = make_inputs(1, 9, 2, 8, 6, torch.float32)
    state = torch.randn(2, 2, 8, 6), torch.rand(2, 2, 8)
    positions, freq = torch.arange(9.0).double().view(1, 9, 1), torch.rand(2, 4, 1).double()
    return [q, k, v, *state, positions, freq, torch.tensor([[0, 5], [5, 9]])]


def _results():
    q, _, v, s, z, *_ = _scan()
    return v, q[..., 0].transpose(1, 2), s, z


def _sines():
    parameters = (torch.rand(2, 8, 3, *more).double() for more in ((1,), (), ()))
    gate, noise = torch.rand(2, 8).double(), torch.randn(2, 8, 7, 4)
    x, _, _ = make_inputs(1, 9, 2, 8, 6, torch.float32)
    return [x, torch.rand(1, 9, 1).double(), *parameters, gate, noise]


def _elsewhere(arguments, i):
    return [x.to("meta") if i == j else x for j, x in enumerate(arguments)]


def _refused(name, first="q"):
    message = f"^{name} must be on the device of {first}, cpu, got meta$"
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("name", tensors.SCAN[1:])
def test_scan_elsewhere(kernels, name):
    backend, i = backends.load(kernels), tensors.SCAN.index(name)
    with _refused(name):
        backend.causal_dot(*_elsewhere(_scan(), i), OPTIONS)
    o, den, *_ = _results()
    with _refused(name):
        inputs = _elsewhere(_scan(), i)
        backend.causal_dot_backward([o, None, None], inputs, OPTIONS, o, den, [True] * 7)


@pytest.mark.parametrize("name", tensors.SCAN_BACKWARD[1:])
def test_gradient_of_a_scan_elsewhere(kernels, name):
    backend = backends.load(kernels)
    o, den, s, z = _results()
    saved = _elsewhere([None, o, s, z, o, den], tensors.SCAN_BACKWARD.index(name))
    with _refused(name):
        backend.causal_dot_backward(saved[1:4], _scan(), OPTIONS, *saved[4:], [True] * 7)


@pytest.mark.parametrize("name", tensors.SINES[1:])
def test_features_elsewhere(kernels, name):
    backend = backends.load(kernels)
    x, positions, *sines = _elsewhere(_sines(), tensors.SINES.index(name))
    sines = SineMap(*sines, False)
    with _refused(name, "x"):
        backend.sine_features(x, positions, sines, True)
    with _refused(name, "x"):
        backend.sine_features_backward(x[..., :4], x, positions, sines, True, [True] * 6)


def test_gradient_of_features_elsewhere(kernels):
    x, positions, *sines = _sines()
    backend, sines = backends.load(kernels), SineMap(*sines, False)
    y = x[..., :4].to("meta")
    with _refused("grad_y", "x"):
        backend.sine_features_backward(y, x, positions, sines, True, [True] * 6)


@pytest.mark.parametrize("name", ["k", "v", "s0", "z0", "positions", "freq"])
def test_step_elsewhere(kernels, name):
    backend = backends.load(kernels)
    if not hasattr(backend, "step"):
        pytest.skip("this backend makes a step of its scan")
    i = tensors.SCAN.index(name)
    q, k, v, s0, z0, positions, freq, _ = _elsewhere(_scan(), i)
    q, k, v, positions = (x[:, :1] for x in (q, k, v, positions))
    maps = (Rotation(freq, True, False, False, 1.0),) * 2
    with _refused(name):
        backend.step(q, k, v, s0[:1], z0[:1], positions, maps, OPTIONS)


def test_noise_elsewhere(kernels):
    backend = backends.load(kernels)
    if not hasattr(backend, "philox_normal"):
        pytest.skip("this backend draws no noise")
    seed, step = torch.tensor(1), torch.tensor(2, device="meta")
    with _refused("step", "seed"):
        backend.philox_normal(seed, step, 0, 0, (2, 3, 4), torch.float32)


class _Misplaced(fastpe.RoPE):
    """Keeps a table under the wrong device."""

    def make_maps(self, device=None):
        return tuple(m._replace(freq=m.freq.to("meta")) for m in super().make_maps(device))


def test_table_elsewhere(kernels):
    """What the public functions are not given, and cannot check."""
    q, k, v = make_inputs(1, 5, 2, 8, 6, torch.float32)
    with _refused("freq"):
        fastpe.causal_linear_attention(q, k, v, pos_encoding=_Misplaced(8), backend=kernels)
    plain = fastpe.RoPE(8)
    _, state = fastpe.causal_linear_attention(
        q, k, v, pos_encoding=plain, output_final_state=True, backend=kernels
    )
    state = state._replace(config=state.config.replace("RoPE", "_Misplaced"))
    token = q[:, 0], k[:, 0], v[:, 0]
    with torch.no_grad(), _refused("freq"):
        fastpe.causal_linear_attention_step(
            *token, state, pos_encoding=_Misplaced(8), backend=kernels
        )


def test_tensors_without_memory_pass():
    """All of them, as where a program is traced: the check compares devices, it needs none."""
    tensors.check_devices(tensors.SCAN, [x.to("meta") for x in _scan()])
