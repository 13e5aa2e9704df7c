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


# tests of the Triton kernels that run in its interpreter, at half a second a case
_THOROUGH = {
    "test_output_state_and_every_gradient",
    "test_shapes",
    "test_gradient_of_the_state_alone",
    "test_ranges_of_heads_that_share",
}
_INTERPRETED = _THOROUGH | {
    "test_any_width",
    "test_default_positions_count_from_the_state",
    "test_dtypes_of_the_results",
    "test_empty_batch_and_sequence",
    "test_every_number_is_philox",
    "test_expanded_inputs",
    "test_features_elsewhere",
    "test_feature_maps_and_normalizers",
    "test_gradient_of_a_scan_elsewhere",
    "test_gradient_of_features_elsewhere",
    "test_gradient_of_frequencies_far_out",
    "test_gradient_of_frequencies_with_a_state",
    "test_heads_that_share",
    "test_integer_positions_beyond_24_bits",
    "test_kernels_are_the_same_to_rounding",
    "test_known_answers",
    "test_last_key_does_not_move_past_outputs",
    "test_negative_views",
    "test_no_token_is_of_a_sequence",
    "test_noise_elsewhere",
    "test_odd_width",
    "test_parameters_in_any_layout",
    "test_sine_features_of_heads_that_share",
    "test_ranges_are_sequences_alone",
    "test_ranges_of_heads_with_frequencies_of_their_own",
    "test_relu_has_no_slope_at_zero",
    "test_rows_from_any_on",
    "test_scan_elsewhere",
    "test_second_derivative_is_never_dropped",
    "test_shapes_of_positions",
    "test_split_and_resume",
    "test_split_denominator",
}


# one for each path through the kernels
_DISTINCT = ("none", "rope", "rope-before", "ropepool", "sinespe", "fstripe-pooled")


# the files whose tests run on every code path of the CPU's kernels, and on the CUDA kernels; in
# others they stand behind arguments and modules, for which the best path does
_EVERY_PATH = {
    "test_attention",
    "test_causal_dot",
    "test_cuda",
    "test_encodings",
    "test_errors",
    "test_noise",
    "test_numerics",
    "test_packing",
    "test_properties",
    "test_ranges",
    "test_robustness",
    "test_spe",
}


def _left_out(item):
    """Return whether a test would take too long for what it adds, in the interpreter above all."""
    spec = getattr(item, "callspec", None)
    params = spec.params if spec else {}
    name, path = params.get("backend", params.get("kernels", ("", 0)))
    if name == "cpu" and item.path.stem not in _EVERY_PATH:
        return path != native.CPU.functions.fastpe_best_isa()
    if name != "triton":
        return False
    dtype = params.get("dtype", torch.float64)
    distinct = spec.id.startswith("triton") or spec.id.split("-triton")[0] in _DISTINCT
    if item.originalname in _THOROUGH:
        # everything in float64 and in one piece, the rest once
        return not (distinct or (dtype == torch.float64 and not path))
    narrow = dtype not in (torch.float64, torch.bfloat16)
    return path or narrow or not distinct or item.originalname not in _INTERPRETED


def pytest_collection_modifyitems(config, items):
    left = [item for item in items if _left_out(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not _left_out(item)]


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


def _cuda_for_host(directory, flags=""):
    library = directory / "libfastpe_cuda_host.so"
    code = "import sys, setup, pathlib; library = pathlib.Path(sys.argv[1]); "
    code += "setup.compile_cuda_for_host(library, library.parent, tuple(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(library), "-O1", *flags.split()]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    return native.Library(library, "fastpe_cuda_", ("", ""), True)


@pytest.fixture(scope="session")
def cuda_host(request, tmp_path_factory):
    """The CUDA kernels as loops on the CPU, which take the same steps (csrc/cuda/block.h)."""
    if request.config.getoption("--cuda-host"):
        library = Path(request.config.getoption("--cuda-host"))
        return native.Library(library, "fastpe_cuda_", ("", ""), True)
    return _cuda_for_host(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="session")
def cuda_host_backwards(tmp_path_factory):
    """The same with what threads do at one time done in the opposite order."""
    return _cuda_for_host(tmp_path_factory.mktemp("backwards"), "-DFASTPE_BACKWARDS")


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
