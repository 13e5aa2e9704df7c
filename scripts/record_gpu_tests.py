"""A pytest plugin: run the GPU tests without a card and record their launches (launches.py).

    FASTPE_RECORD=90:0:FILE python -m pytest -o addopts= -p record_gpu_tests tests/gpu/test_gpu*.py

Tensors are on the CPU and kernels write nothing, so the tests compare nothing. -p loads the plugin
before tests/conftest.py, which then finds a card.
"""

import contextlib
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import gpu
import helpers
import launches

from fastpe import backends
from fastpe.backends import triton as backend

ARCH, MISSED, FILE = os.environ["FASTPE_RECORD"].split(":")


class _Stream:
    """A stream whose work is always done."""

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass


def _nothing(*args, **options):
    pass


def _pretend_tests():
    gpu.DEVICE, gpu.ENGINES = "cpu", ("triton",)
    gpu.engines = pytest.mark.parametrize("engine", gpu.ENGINES, indirect=True)
    gpu.make_graph = lambda run: (SimpleNamespace(replay=run), run())
    helpers.assert_close = helpers.assert_within = helpers.Problem.check = _nothing
    helpers.Problem.plain = lambda *args, **options: []
    helpers.Problem.expected = lambda *args, **options: {}


def _pretend_torch():
    cuda = torch.cuda
    cuda.synchronize = cuda._sleep = cuda.set_sync_debug_mode = cuda.empty_cache = _nothing
    cuda.get_sync_debug_mode, cuda.mem_get_info = _nothing, lambda *args: (0, 0)
    cuda.Stream, cuda.current_stream = _Stream, _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # compiling takes long and launches the same kernels
    torch.compile = lambda module, **options: module


def _pretend_backend():
    backend.INTERPRETED = True
    unavailable = backends.unavailable
    backends.unavailable = lambda name, *rest: (
        None if name == "triton" else unavailable(name, *rest)
    )
    backends.current_device = lambda: torch.device("cpu")


torch.cuda.is_available = lambda: True
_pretend_tests()
_pretend_torch()
_pretend_backend()


def _few(*bounds):
    """Replace `range`: repetitions launch nothing new."""
    return range(2) if len(bounds) == 1 and bounds[0] >= 20 else range(*bounds)


def pytest_collection_modifyitems(items):
    """Disable the comparisons and loops that the test files define themselves."""
    for module in {item.module for item in items}:
        module.range = _few
        for name in ("_check", "_equal"):
            if hasattr(module, name):
                setattr(module, name, _nothing)
        if hasattr(module, "HOST_MICROSECONDS"):
            module.HOST_MICROSECONDS = float("inf")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Record the backend's self-check and all tests."""
    with launches.recording(ARCH, MISSED == "1") as recorder:
        launch = recorder.launch

        def finite(kernel, grid, tensors, numbers):
            recorder.case = os.environ.get("PYTEST_CURRENT_TEST", "self-check").partition(" ")[0]
            launch(kernel, grid, tensors, numbers)
            # conftest.py fills new memory with NaN, on which tests cannot go on
            for x in tensors:
                x.data.nan_to_num_()

        recorder.launch = finite
        backend.miscompiled(torch.device("cpu"))
        result = yield
    Path(FILE).write_bytes(pickle.dumps(list(recorder.found)))
    said = f"{recorder.hits} kernels were in the cache, " if MISSED == "1" else ""
    print(f"\n{said}{recorder.count} launches, {len(recorder.found)} kernels to compile")
    return result
