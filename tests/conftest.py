"""Fixtures: every backend and code path, every encoding, and NaN in memory not yet written."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import selection
import torch
from helpers import Fade
from ranks import Ranks
from watch import Watch

# before any kernel is imported
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.mend()

import fastpe
from fastpe import backends
from fastpe.backends import native


def pytest_addoption(parser):
    parser.addoption("--library", help="test this build of the CPU library (scripts/sanitize.sh)")
    parser.addoption("--cuda-host", help="and this one of the CUDA kernels for the host")
    parser.addoption(
        "--record", action="append", default=[], help="append each report to this file, as JSON"
    )


def pytest_configure(config):
    if config.getoption("--library"):
        native.CPU.path = Path(config.getoption("--library"))
    config.pluginmanager.register(Watch(config))


def _factory(kind, **options):
    """Return a function of (head_dim, num_heads) that makes the same module each time."""

    def make(head_dim, num_heads):
        chosen = {name: f(head_dim) if callable(f) else f for name, f in options.items()}
        if "seed" not in chosen and chosen.get("num_realizations"):
            chosen["seed"] = 1234567890123456789
        with torch.random.fork_rng():
            torch.manual_seed(11)
            encoding = kind(head_dim, num_heads, **chosen)
            with torch.no_grad():
                # levels of a vector start equal, which would hide one taken for another
                for name, p in encoding.named_parameters():
                    if name == "theta":
                        p.mul_(1 + 0.2 * torch.randn_like(p))
                    elif name == "freqs":
                        p.add_(2)  # periods of 2 to 100, as the positions of the tests
        return encoding

    return make


ConvSPE, SineSPE, FStripe = fastpe.ConvSPE, fastpe.SineSPE, fastpe.FStripe
RoPE, RoPEPool = fastpe.RoPE, fastpe.RoPEPool
_spe = functools.partial(_factory, SineSPE, num_sines=3)
_fstripe = functools.partial(_factory, FStripe, num_sines=3)

# factories of an encoding for (head_dim, num_heads); a new encoding is a new row
ENCODINGS = [
    pytest.param(lambda head_dim, num_heads: None, id="none"),
    pytest.param(_factory(RoPE), id="rope"),
    pytest.param(_factory(RoPE, interleaved=False), id="rope-half"),
    pytest.param(_factory(RoPE, rotary_dim=lambda d: 2 * -(-d // 4)), id="rope-partial"),
    pytest.param(_factory(RoPE, apply="before"), id="rope-before"),
    pytest.param(_factory(RoPE, learned=True, per_head=True), id="rope-learned"),
    pytest.param(_factory(RoPE, learned=True, num_levels=3), id="rope-vector"),
    pytest.param(_factory(RoPEPool), id="ropepool"),
    pytest.param(_spe(num_realizations=14), id="sinespe"),
    pytest.param(_spe(num_realizations=16, gated=False), id="sinespe-ungated"),
    pytest.param(_spe(num_realizations=None), id="sinespe-exact"),
    pytest.param(_factory(ConvSPE, kernel_size=5, num_realizations=14), id="convspe"),
    pytest.param(_fstripe(), id="fstripe-pooled"),
    pytest.param(_fstripe(pool=False, gated=True), id="fstripe-unpooled"),
    pytest.param(_fstripe(num_realizations=12, gated=True), id="fstripe-sff"),
    pytest.param(_fstripe(num_levels=3, pool=False), id="fstripe-vector"),
    pytest.param(Fade, id="custom"),
]


def encodings(*names):
    """Return the rows of ENCODINGS with these ids, or all but those that start with "-"."""
    without = {name[1:] for name in names if name[0] == "-"}
    return [p for p in ENCODINGS if (p.id not in without if without else p.id in names)]


def _backends():
    for name, reason in fastpe.available_backends().items():
        if name == "cuda":
            continue  # here its kernels run as "cuda-host", on a card in test_gpu.py
        if reason is not None:
            skip = pytest.mark.skip(reason=f"backend {name!r} is not available: {reason}")
            yield pytest.param((name, 0), id=name, marks=skip)
        elif name == "cpu":
            for isa in range(1, native.CPU.functions.fastpe_best_isa() + 1):
                yield pytest.param((name, isa), id=f"{name}-{native.ISAS[isa]}")
            yield pytest.param((name, "cuda-host"), id="cuda-host")
        elif name == "triton":
            if torch.cuda.is_available():
                continue  # not for the tensors of these tests: test_gpu.py
            yield pytest.param((name, False), id=name)
            yield pytest.param((name, True), id=f"{name}-segments")
        else:
            yield pytest.param((name, 0), id=name)


def pytest_generate_tests(metafunc):
    # not before --library has been read
    for name in {"backend", "kernels"} & set(metafunc.fixturenames):
        rows = [p for p in _backends() if name == "backend" or p.values[0][0] != "reference"]
        metafunc.parametrize(name, rows, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    left = [item for item in items if selection.left_out(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not selection.left_out(item)]
    selection.mark_slow(items)


def _select(request, monkeypatch):
    name, path = request.param
    if path == "cuda-host":
        monkeypatch.setitem(native.libraries, "cpu", request.getfixturevalue("cuda_host"))
    elif name == "cpu":
        monkeypatch.setattr(native.library, "isa", path)
    elif name == "triton" and path:
        # every chunk is a segment
        cut = lambda programs, t, c, *_: (c, max(-(-t // c), 1))  # noqa: E731
        monkeypatch.setattr(f"{backends.load(name).__name__}.causal_dot_launch.segments", cut)
    return name


def _cuda_for_host(tmp_path_factory, name, flags=""):
    """Return the library, which the first worker builds for all of them."""
    import fcntl  # not on Windows

    folder = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each worker a folder in one of the run
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    library = folder / "libfastpe_cuda_host.so"
    code = "import sys, setup, pathlib; library = pathlib.Path(sys.argv[1]); "
    code += "setup.compile_cuda_for_host(library, library.parent, tuple(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(library), "-O1", *flags.split()]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    return native.Library(library, "fastpe_cuda_", ("", ""), True)


@pytest.fixture(scope="session")
def cuda_host(request, tmp_path_factory):
    """The CUDA kernels as loops on the CPU, which take the same steps (csrc/cuda/block.h)."""
    if request.config.getoption("--cuda-host"):
        library = Path(request.config.getoption("--cuda-host"))
        return native.Library(library, "fastpe_cuda_", ("", ""), True)
    return _cuda_for_host(tmp_path_factory, "cuda_host")


@pytest.fixture(scope="session")
def cuda_host_backwards(tmp_path_factory):
    """The same with what threads do at one time done in the opposite order."""
    return _cuda_for_host(tmp_path_factory, "backwards", "-DFASTPE_BACKWARDS")


@pytest.fixture
def backend(request, monkeypatch):
    """Every backend that can run here, and every code path of the native ones."""
    return _select(request, monkeypatch)


@pytest.fixture
def kernels(request, monkeypatch):
    """The backends with kernels of their own."""
    return _select(request, monkeypatch)


@pytest.fixture
def native_kernels():
    """The native backend on the code path that it picks itself."""
    reason = fastpe.available_backends()["cpu"]
    if reason is not None:
        pytest.skip(f"backend 'cpu' is not available: {reason}")
    return "cpu"


@pytest.fixture
def on_a_gpu(request):
    """Skip where there is none, and say what was not checked: the docstring of the test."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU; not checked: {request.function.__doc__.splitlines()[0]}")
    yield
    # a kernel that failed late is this test's failure, not the next one's
    torch.cuda.synchronize()


@pytest.fixture
def engine(request, on_a_gpu):
    """A backend that runs on the GPU."""
    reason = gpu.usable(request.param)
    if reason is not None:
        what = request.function.__doc__.splitlines()[0]
        pytest.skip(f"backend {request.param!r}: {reason}; not checked: {what}")
    return request.param


@pytest.fixture(params=ENCODINGS)
def make_encoding(request):
    """Factory of every encoding, (head_dim, num_heads) -> module or None."""
    return request.param


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch):
    """Let fastpe find NaN in torch.empty and its kin, so that outputs left unwritten show."""

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "fastpe":
                with torch.no_grad():
                    # bytes are memory to be cut up: all ones are NaN of every width
                    ones = 255 if x.dtype == torch.uint8 else -1
                    wrong = ones if x.itemsize == 1 else -(2**31) + 1
                    x.fill_(math.nan if x.is_floating_point() else wrong)
            return x

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Most tensors are tiny: threads would wait for one another; some tests ask for more."""
    torch.set_num_threads(1)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone behind the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Processes that run a function as ranks of a group: ranks(size, function, *args)."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    workers = Ranks()
    yield workers
    workers.close()


@pytest.fixture
def compiled():
    """torch.compile of a module as one graph, by aot_eager."""
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
