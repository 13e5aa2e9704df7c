"""What the GPU tests share: where they run, on what, and what a skipped one leaves unchecked."""

import pytest
import torch

import fastpe

DEVICE = "cuda"
ENGINES = ("triton", "cuda")

gpu_only = [pytest.mark.gpu, pytest.mark.usefixtures("on_a_gpu")]
engines = pytest.mark.parametrize("engine", ENGINES, indirect=True)


def usable(engine):
    """Return why a backend cannot be tested here, or None."""
    if engine not in fastpe.backends.NAMES:
        return f"this version has no backend {engine!r}"
    return fastpe.available_backends()[engine]


def take(engine, run):
    """Return what `run` returns; skip where the backend itself says that it does not take this."""
    try:
        return run()
    except (ValueError, TypeError, RuntimeError) as error:
        if f"backend {engine!r}" not in str(error):
            raise
        pytest.skip(f"not checked: {error}")


def make_graph(run):
    """Return a CUDA graph of a call, and its outputs, which each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs
