"""What only a GPU has: streams, graphs, the compiler, autocast, the time to launch; repeats."""

import copy
import statistics
import time

import pytest
import torch
from conftest import ENCODINGS, encodings
from gpu import DEVICE, engines, gpu_only, make_graph, take
from helpers import assert_close, assert_within, leaf, make_inputs, make_positions, traced

from fastpe import RoPE, backends, causal_linear_attention, causal_linear_attention_step
from fastpe.nn import CausalLinearAttention

pytestmark = gpu_only

SHAPE = 2, 150, 3, 64, 48
SOME = encodings("none", "rope", "rope-learned", "ropepool", "sinespe", "fstripe-sff")
HOST_MICROSECONDS = 40


class Call:
    """A call on tensors that stay where they are: what a graph records."""

    def __init__(self, make, engine, shape=SHAPE, dtype=torch.bfloat16):
        b, t, h, d, e = self.shape = shape
        self.engine, self.dtype = engine, dtype
        self.encoding = make(d, h)
        if self.encoding is not None:
            self.encoding.to(DEVICE)
        self.positions = make_positions(self.encoding, b, t, device=DEVICE)
        self.inputs = [leaf(x) for x in make_inputs(*shape, dtype, device=DEVICE)]
        self.do = make_inputs(b, t, h, e, e, dtype, seed=1, device=DEVICE)[0]

    def refill(self, seed):
        """Put other numbers into the inputs."""
        with torch.no_grad():
            for x, y in zip(self.inputs, make_inputs(*self.shape, self.dtype, seed), strict=True):
                x.copy_(y)

    def forward(self):
        """Return o and the final state."""
        with torch.no_grad():
            return self._attend()

    def training(self):
        """Return o, the final state and every gradient."""
        outputs = self._attend()
        learned = [] if self.encoding is None else list(self.encoding.parameters())
        grads = torch.autograd.grad(outputs[0], [*self.inputs, *learned], self.do)
        return [*(x.detach() for x in outputs), *grads]

    def _attend(self):
        o, state = causal_linear_attention(
            *self.inputs,
            pos_encoding=self.encoding,
            positions=self.positions,
            output_final_state=True,
            backend=self.engine,
        )
        return [o, state.s, state.z]


def _equal(actual, expected):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(x, y), f"result {i} differs by {(x.double() - y.double()).abs().max()}"


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ENCODINGS)
def test_same_bits_every_time(engine, make, dtype):
    """Twenty runs, forward and backward, give the same bits."""
    d = 64 if make(64, 8) is None or make(64, 8).feature_dim <= 256 else 32
    run = Call(make, engine, (4, 333, 8, d, 64), dtype).training
    first = take(engine, run)
    for _ in range(20):
        _equal(run(), first)


@engines
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("make", SOME)
def test_graph(engine, make, mode):
    """A CUDA graph of a forward, and of a training step, gives for new inputs what a call gives."""
    case = Call(make, engine)
    run = getattr(case, mode)
    take(engine, run)
    graph, outputs = make_graph(run)
    for seed in (1, 2):
        case.refill(seed)
        graph.replay()
        replayed = [x.clone() for x in outputs]
        _equal(replayed, run())


@engines
@pytest.mark.parametrize("make", SOME)
def test_graph_of_a_step(engine, make):
    """A CUDA graph of one step decodes a sequence, its state copied back each time."""
    case = Call(make, engine)
    encoding, options = case.encoding, {"pos_encoding": case.encoding, "backend": engine}

    def where(t):
        if encoding is None:
            return None
        at = case.positions[:, t]
        return at if encoding.num_levels > 1 else at[:, 0]

    def run():
        o, after = causal_linear_attention_step(*token, state, positions=position, **options)
        return o, after.s, after.z

    with torch.no_grad():
        start = take(
            engine,
            lambda: causal_linear_attention(
                *(x[:, :10] for x in case.inputs),
                positions=None if encoding is None else case.positions[:, :10],
                output_final_state=True,
                **options,
            ),
        )[1]
        state = start._replace(s=start.s.clone(), z=start.z.clone())
        token = [x[:, 10].clone() for x in case.inputs]
        position = None if encoding is None else where(10).clone()
        graph, outputs = make_graph(run)
        state.s.copy_(start.s)
        state.z.copy_(start.z)
        going = start
        for t in range(10, 20):
            for x, y in zip(token, case.inputs, strict=True):
                x.copy_(y[:, t])
            if position is not None:
                position.copy_(where(t))
            graph.replay()
            o, going = causal_linear_attention_step(
                *(x[:, t] for x in case.inputs), going, positions=where(t), **options
            )
            _equal(outputs, (o, going.s, going.z))
            state.s.copy_(outputs[1])
            state.z.copy_(outputs[2])


@engines
@pytest.mark.parametrize("make", SOME)
def test_side_stream(engine, make):
    """Everything runs on the current stream: behind what is slow there, forward and backward."""
    case = Call(make, engine)
    expected = take(engine, case.training)
    right = [x.detach().clone() for x in case.inputs]
    with torch.no_grad():
        for x in case.inputs:
            x.fill_(1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # some 50 ms, in which anything on another stream would see ones
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for x, y in zip(case.inputs, right, strict=True):
                x.copy_(y)
        results = case.training()
    side.synchronize()
    _equal(results, expected)


@engines
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("make", SOME)
def test_host_never_waits(engine, make, mode):
    """Nothing in a call waits for the device."""
    run = getattr(Call(make, engine), mode)
    take(engine, run)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@engines
@pytest.mark.parametrize("make", encodings("none", "rope"))
def test_host_time(engine, make, monkeypatch):
    """An eager forward costs the host 40 us at the most: median over a thousand calls."""
    # without what the tests themselves do in torch.empty
    monkeypatch.undo()
    run = Call(make, engine, (1, 64, 2, 64, 64)).forward
    take(engine, run)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        for _ in range(50):
            start = time.perf_counter_ns()
            run()
            times.append((time.perf_counter_ns() - start) * 1e-3)
    median = statistics.median(times)
    print(f"host time of a forward, {engine}: {median:.1f} us")
    assert median <= HOST_MICROSECONDS


def test_new_memory_is_nan():
    """The fixture that fills new memory with NaN for fastpe does so on the GPU."""
    names = {"__name__": "fastpe.test", "torch": torch}
    for dtype in ("float32", "bfloat16"):
        made = f"torch.empty(5, dtype=torch.{dtype}, device={DEVICE!r})"
        assert eval(made, names).isnan().all()
    assert eval(f"torch.empty(8, dtype=torch.uint8, device={DEVICE!r})", names).eq(255).all()


@traced
@engines
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor(engine):
    """torch.compile of the layer as one graph, by inductor, forward and backward."""
    torch.manual_seed(0)
    layer = CausalLinearAttention(96, 3, pos_encoding=RoPE(32), backend=engine, device=DEVICE)
    x = torch.randn(2, 70, 96, device=DEVICE)

    def run(module):
        given = leaf(x)
        y = module(given)
        return y, *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])

    expected = take(engine, lambda: run(layer))
    torch._dynamo.reset()
    try:
        fast = torch.compile(layer, fullgraph=True)
        for actual, wanted in zip(run(fast), expected, strict=True):
            assert_within(actual, wanted, 1e-5)
    finally:
        torch._dynamo.reset()


@engines
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_autocast(engine, make):
    """A training step under autocast is as near to float64 as the reference's under autocast."""
    torch.manual_seed(0)
    layer = CausalLinearAttention(128, 2, pos_encoding=make(64, 2), backend="reference")
    layer = layer.to(DEVICE).eval()
    x = torch.randn(2, 140, 128, device=DEVICE)
    weight = torch.randn(2, 140, 128, device=DEVICE)

    def step(layer, x, autocast=True):
        x = leaf(x)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = layer(x)
        names, learned = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad((y.double() * weight).sum(), [x, *learned])
        return {"y": y} | {f"d{name}": g for name, g in zip(("x", *names), grads, strict=True)}

    exact = step(copy.deepcopy(layer).double(), x.double(), autocast=False)
    # the same numbers in another order of rounding, twice more
    eps = torch.finfo(torch.bfloat16).eps
    plain = [step(layer, x * (1 + s * eps / 2)) for s in (0, 1, -1)]
    layer.backend = engine
    actual = take(engine, lambda: step(layer, x))
    assert actual["y"].dtype == torch.bfloat16
    assert_close(actual, exact, plain, torch.bfloat16)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe", "fstripe-pooled"))
def test_sanitize(engine, make, dtype):
    """Small odd sizes, forward, backward and a step, for compute-sanitizer to look at."""
    case = Call(make, engine, (2, 70, 2, 24, 20), dtype)
    for x in take(engine, case.training):
        assert x.isfinite().all()
    with torch.no_grad():
        o, state = causal_linear_attention(
            *case.inputs,
            pos_encoding=case.encoding,
            positions=case.positions,
            output_final_state=True,
            backend=engine,
        )
        where = None if case.encoding is None else case.positions[:, 0, 0]
        o, state = causal_linear_attention_step(
            *(x[:, 0] for x in case.inputs),
            state,
            pos_encoding=case.encoding,
            positions=where,
            backend=engine,
        )
    assert o.isfinite().all()


def test_first_use_in_inference_mode():
    """The check of the compiler differentiates, whatever mode the first call is in."""
    backends._reasons.clear()
    with torch.inference_mode():
        reason = backends.unavailable("triton")
    assert reason is None
