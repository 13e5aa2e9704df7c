"""Processes: workers, forks after threads were used, programs of their own."""

import functools
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from helpers import leaf, make_inputs

import fastpe
from fastpe import RoPE, SineSPE, causal_linear_attention
from fastpe.backends import native
from fastpe.backends.specs import ScanOptions

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks"),
    # what Python 3.12 says of every fork of a process with threads
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]


class _Computed(torch.utils.data.Dataset):
    """Attention of numbers that the index decides."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        q, k, v = make_inputs(2, 300, 4, 32, 16, torch.float32, seed=i)
        with torch.no_grad():
            return causal_linear_attention(q, k, v, pos_encoding=RoPE(32), backend="cpu")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader(native_kernels, threads, start):
    threads(2)
    data = _Computed()
    expected = [data[i] for i in range(4)]  # starts the threads
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, timeout=60, multiprocessing_context=start
    )
    for x, y in zip(loader, expected, strict=True):
        assert torch.equal(x, y)


def _attend():
    # enough work for two threads of ours, too little for torch's own, which would wait in a child
    q, k, v = (leaf(x) for x in make_inputs(2, 100, 4, 32, 16, torch.float32))
    o = causal_linear_attention(q, k, v, pos_encoding=RoPE(32), backend="cpu")
    return [o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))]


@functools.cache
def _tensors():
    # made before the fork: torch's own exp waits in a child
    encoding = SineSPE(32, 4, num_sines=3, num_realizations=8, seed=1)
    with torch.no_grad():
        maps = encoding.make_maps()
    q, k, v = make_inputs(2, 100, 4, 32, 16, torch.float32)
    return q, k, v, torch.arange(100.0).double().view(1, 100, 1), maps


def _make_features():
    q, _, _, positions, (sines, _) = _tensors()
    y = native.sine_features(q, positions, sines, True)
    needs = [True, False, True, True, True, True]
    return [y, *native.sine_features_backward(y, q, positions, sines, True, needs)]


def _take_a_step():
    q, k, v, positions, maps = _tensors()
    options = ScanOptions(backend="cpu")
    state = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 0)
    token = (x[:, :1] for x in (q, k, v))
    return list(native.step(*token, *state, positions[:, :1], maps, options))


def _draw():
    key = torch.tensor(3), torch.tensor(4)
    return [torch.ops.fastpe.philox_normal(*key, 1, 0, [64, 8, 16], torch.float32)]


def _with_threads_of_its_own():
    torch.set_num_threads(3)
    return _attend()


def _in_fork(function, *args):
    """Return the tensors that a function returns in a forked process, which must end."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)

    def run():
        send.send([x.numpy() for x in function(*args)])

    child = context.Process(target=run)
    child.start()
    try:
        assert receive.poll(30), "the forked process waits for threads of its parent"
        found = receive.recv()
        child.join(30)
    finally:
        child.kill()
    return [torch.from_numpy(x) for x in found]


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
@pytest.mark.parametrize(
    "function", [_attend, _make_features, _take_a_step, _draw, _with_threads_of_its_own]
)
def test_fork_of_a_process_with_threads(native_kernels, threads, function, ours):
    """Whoever used OpenMP's threads: the child, and its child, end with the same bits."""
    threads(1)
    expected = function()
    threads(2)
    torch.ones(1 << 20).exp()
    if ours:
        _attend()
    for found in (_in_fork(function), _in_fork(_in_fork, function)):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_forked_processes_keep_their_threads(native_kernels, threads, monkeypatch):
    """For all but single tokens, and they leave none behind."""
    threads(2)
    counted = []

    def call(library, name, *args):
        counted.append(args[0].threads)
        return run(library, name, *args)

    run = fastpe.backends.native.library.Library.run
    _tensors()
    monkeypatch.setattr(fastpe.backends.native.library.Library, "run", call)
    monkeypatch.setattr(fastpe.backends.forks, "forked", True)
    _attend()
    assert counted == [2, 2]
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        _attend()
    assert len(os.listdir("/proc/self/task")) <= before + 4
    counted.clear()
    _take_a_step()
    assert counted == [1]


_IMPORT_IN_THE_CHILD = """
import os, signal, torch
torch.set_num_threads(2)
torch.ones(1 << 20).exp()

def attend():
    import fastpe
    x = torch.linspace(-1, 1, 2 * 100 * 4 * 32).view(2, 100, 4, 32)
    return fastpe.backends.forks.forked, fastpe.causal_linear_attention(x, x, x).numpy().tobytes()

receive, send = os.pipe()
if os.fork() == 0:
    signal.alarm(60)
    forked, o = attend()
    os.write(send, b"forked" if forked else b"not")
    os._exit(0 if o else 1)
print(os.read(receive, 10).decode(), os.wait()[1], attend()[0])
"""


def test_import_in_a_forked_process(native_kernels):
    """The fork came before fastpe: it is known all the same, and a started program is none."""
    run = [sys.executable, "-W", "ignore", "-c", _IMPORT_IN_THE_CHILD]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["forked", "0", "False"], done.stderr
