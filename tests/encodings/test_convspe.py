"""ConvSPE: its kernel, its codes wherever tokens stand, its gradients, its noise."""

import copy
import math

import oracle
import pytest
import torch
from helpers import assert_close, assert_within, leaf, make_inputs, traced

import fastpe
from fastpe import ConvSPE, causal_linear_attention, causal_linear_attention_step
from fastpe.encodings.convspe import SharedConvSPE
from fastpe.nn import CausalLinearAttention
from fastpe.ops.conv_features import TILE

H, D = 2, 5
# within a tile of positions, over several, and none at all
LENGTHS = (1, 7, TILE, 2 * TILE + 3)


def _encoding(**options):
    torch.manual_seed(1)
    chosen = {"kernel_size": 6, "num_realizations": 7, "seed": 2**40 + 3} | options
    return ConvSPE(D, H, **chosen).double()


def _expected(encoding, x, positions, side):
    params = {name: leaf(p) for name, p in encoding.named_parameters()}
    y = oracle.conv_features(encoding, params, x, positions, side)
    grads = torch.autograd.grad(y.square().sum(), [x, *params.values()], allow_unused=True)
    return {"y": y, "dx": grads[0]} | _named(params, grads[1:])


def _actual(encoding, x, positions, side):
    params = dict(encoding.named_parameters())
    y = encoding.features(x, positions, side)
    grads = torch.autograd.grad(y.square().sum(), [x, *params.values()], allow_unused=True)
    return {"y": y, "dx": grads[0]} | _named(params, grads[1:])


def _named(params, grads):
    return {f"d{name}": g for name, g in zip(params, grads, strict=True) if g is not None}


def _positions(kind, b, t):
    generator = torch.Generator().manual_seed(4)
    return {
        "time": torch.arange(t).view(1, t),
        "far": torch.arange(t).view(1, t) + 2**32 - 3,
        "negative": torch.arange(t).view(1, t) - 2**31 - 5,
        "shared": torch.randint(-100, 100, (1, t), generator=generator),
        "own": torch.randint(-100, 100, (b, t), generator=generator),
        "one": torch.full((b, t), 3),
        "restarts": (torch.arange(t) % 5).view(1, t),
    }[kind].double()[..., None]


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("kind", ["time", "far", "negative", "shared", "own", "one", "restarts"])
def test_features_and_gradients(kind, side, t):
    """Codes of any positions, against noise looked up token by token."""
    encoding = _encoding()
    x = leaf(make_inputs(3, t, H, D, 1)[0])
    positions = _positions(kind, 3, t)
    actual = _actual(encoding, x, positions, side)
    assert set(actual) == {"y", "dx", f"dweight_{side}", "dgate"}
    assert_close(actual, _expected(encoding, x, positions, side))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"gated": False}, (2, 9)),
        ({"kernel_size": 1}, (2, 9)),
        ({"kernel_size": TILE + 9}, (2, 2 * TILE)),
        ({"kernel_size": 3 * TILE}, (1, 5)),
        ({"num_realizations": 1}, (2, 9)),
    ],
    ids=str,
)
def test_sizes(options, shape):
    """No gate, one tap, filters longer than a tile and than the sequence, one realisation."""
    encoding = _encoding(**options)
    x = leaf(make_inputs(*shape, H, D, 1)[0])
    positions = torch.arange(shape[1]).double().view(1, -1, 1) - 4
    assert_close(_actual(encoding, x, positions, "q"), _expected(encoding, x, positions, "q"))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_empty(shape, shared):
    encoding = _encoding()
    x = leaf(make_inputs(*shape, H, D, 1)[0])
    positions = torch.zeros(1 if shared else shape[0], shape[1], 1, dtype=torch.float64)
    y = encoding.features(x, positions, "q")
    assert y.shape == (*shape, H, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert encoding.weight_q.grad.isfinite().all()


def test_gradcheck():
    """T7."""
    encoding = _encoding(kernel_size=3)
    x = leaf(make_inputs(2, 4, H, D, 1)[0])
    positions = torch.tensor([-1.0, 70, 70, 2]).double().view(1, 4, 1)

    def run(x, weight_q, gate):
        given = {"weight_q": weight_q, "gate": gate}
        return torch.func.functional_call(Features(encoding), _prefixed(given), (x, positions))

    assert torch.autograd.gradcheck(run, (x, encoding.weight_q, encoding.gate))


class Features(torch.nn.Module):
    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, x, positions):
        return self.encoding.features(x, positions, "q")


def _prefixed(params):
    return {f"encoding.{name}": x for name, x in params.items()}


def test_codes_do_not_depend_on_what_else_is_asked_for():
    """T13, to the bit: in prefix, in order, one token alone."""
    encoding = _encoding().float()
    x = make_inputs(1, 300, H, D, 1, torch.float32)[0]
    positions = torch.arange(300).double().view(1, 300, 1)
    whole = encoding.features(x, positions, "q")
    assert torch.equal(encoding.features(x[:, :101], positions[:, :101], "q"), whole[:, :101])
    order = torch.randperm(300)
    assert torch.equal(encoding.features(x[:, order], positions[:, order], "q"), whole[:, order])
    for t in (0, 64, 299):
        alone = encoding.features(x[:, t : t + 1], positions[:, t : t + 1], "q")
        assert torch.equal(alone[:, 0], whole[:, t])


@pytest.mark.parametrize("value", [0.5, 1e-9, 2.0**40 + 0.25])
def test_other_positions_are_refused(value):
    encoding, x = _encoding(), make_inputs(1, 3, H, D, 1)[0]
    positions = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    for call in (
        lambda: encoding.features(x, positions.view(1, 3, 1), "q"),
        lambda: causal_linear_attention(x, x, x, pos_encoding=encoding, positions=positions),
        lambda: encoding.kernel(positions),
    ):
        with pytest.raises(ValueError, match="positions must be integers"):
            call()


# the kernel


def _kernel(encoding, lag):
    """C_d of docs/math.md, "SPE with sines", sum by sum."""
    a, b, taps = encoding.weight_q, encoding.weight_k, encoding.kernel_size
    p = sum(
        (a[..., j] * b[..., j + lag] for j in range(taps) if 0 <= j + lag < taps),
        torch.zeros(H, D, dtype=torch.float64),
    )
    g = encoding.gate.sigmoid() if encoding.gated else torch.zeros(H, D)
    return ((1 - g) * p + g).detach()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("realizations", [7, None])
def test_closed_form(gated, realizations):
    encoding = _encoding(gated=gated, num_realizations=realizations)
    lags = torch.tensor([[0, 1, -1, 5], [-5, 6, -6, 2**40]])
    c = encoding.kernel(lags)
    assert c.shape == (2, 4, H, D, D)
    wanted = torch.stack([_kernel(encoding, int(lag)) for lag in lags.flatten()])
    assert_within(c, torch.diag_embed(wanted).view_as(c), 1e-12)
    assert torch.equal(encoding.kernel(lags + 3, torch.tensor(3)), c)


def test_mean_is_the_kernel():
    """T2: within 5 sigma of the variance of docs/math.md, whose codes these are too."""
    r = 50_000
    encoding = _encoding(num_realizations=r, kernel_size=3)
    q, k = make_inputs(1, 4, H, D, 1)[:2]
    s = torch.arange(4).double().view(1, 4, 1)
    with torch.no_grad():
        q_hat, k_hat = encoding.features(q, s, "q"), encoding.features(k, s, "k")
    products = torch.einsum("bmhr,bnhr->mnh", q_hat, k_hat)
    c = torch.stack([torch.stack([_kernel(encoding, m - n) for n in range(4)]) for m in range(4)])
    rho = torch.einsum("mhd,nhd,mnhd->mnh", q[0], k[0], c)
    g = encoding.gate.sigmoid()
    powers = [((1 - g) * w.square().sum(-1) + g) for w in (encoding.weight_q, encoding.weight_k)]
    sq, sk = ((x[0] ** 2 * p).sum(-1) for x, p in zip((q, k), powers, strict=True))
    sigma = ((sq[:, None] * sk[None] + rho**2) / D).sqrt()
    assert ((products - math.sqrt(r / D) * rho).abs() < 5 * sigma).all()


def test_initial_parameters():
    """docs/math.md, "SPE with sines": E P_d(0) = 1/2."""
    encoding = ConvSPE(64, 8)
    assert encoding.weight_q.shape == encoding.weight_k.shape == (8, 64, 128)
    for weight in (encoding.weight_q, encoding.weight_k):
        assert 0 <= weight.min() < weight.max() < 1 / 8
        assert weight.mean().item() == pytest.approx(1 / 16, rel=0.02)
    p = (encoding.weight_q * encoding.weight_k).sum(-1)
    assert p.mean().item() == pytest.approx(0.5, abs=5 * p.std().item() / 512**0.5)
    assert encoding.gate.std().item() == pytest.approx(1, abs=0.2)


# decoding, sharing, compiling


def test_decoding_at_any_position():
    """Noise belongs to a position: a sequence goes on from anywhere, a token stands anywhere."""
    encoding = _encoding()
    q, k, v = make_inputs(2, 9, H, D, 3)
    positions = torch.tensor([0, 1, 2, 900, 901, -4, 2, 2, 10**9])
    options = {"pos_encoding": encoding, "backend": "reference"}
    with torch.no_grad():
        whole = causal_linear_attention(q, k, v, positions=positions, **options)
        _, state = causal_linear_attention(
            *(x[:, :3] for x in (q, k, v)), output_final_state=True, **options
        )
        for t in range(3, 9):
            o, state = causal_linear_attention_step(
                q[:, t], k[:, t], v[:, t], state, positions=int(positions[t]), **options
            )
            assert_within(o, whole[:, t], 1e-11)


@pytest.mark.parametrize("realizations", [7, None])
def test_shares_have_filters_in_common(realizations):
    source = _encoding(num_realizations=realizations)
    shares = source.share(), source.share().share()
    assert [share.module_id for share in shares] == [1, 3]
    assert len({id(share.source) for share in shares}) == 1
    for share in shares:
        share.double()
        assert isinstance(share, SharedConvSPE)
        assert [name for name, _ in share.named_parameters(recurse=False)] == ["gate"]
        with torch.no_grad():
            share.gate.copy_(source.gate)
        assert torch.equal(share.kernel(torch.arange(9)), source.kernel(torch.arange(9)))
    if realizations is None:
        return
    x, positions = make_inputs(1, 5, H, D, 1)[0], torch.arange(5).double().view(1, 5, 1)
    with torch.no_grad():
        for encoding in (source, *shares):
            encoding.gate.fill_(-60)
        here = source.features(x, positions, "q")
        assert_within(shares[0].features(x, positions, "q"), here, 1e-12)
        for encoding in (source, *shares):
            encoding.gate.fill_(60)
        gates = [e.features(x, positions, "q") for e in (source, *shares)]
    assert min((a - b).abs().max() for a, b in ((gates[0], gates[1]), (gates[1], gates[2]))) > 0.1
    source.resample_()
    assert all(torch.equal(share.noise_key, source.noise_key) for share in shares)
    twin = copy.deepcopy(torch.nn.ModuleList([source, *shares]))
    assert twin[1].source is twin[0]


@traced
def test_compiles_as_one_graph(compiled):
    torch.manual_seed(2)
    layer = CausalLinearAttention(
        D * H, H, pos_encoding=ConvSPE(D, H, kernel_size=6, num_realizations=7, seed=3)
    )
    twin, x = copy.deepcopy(layer), torch.randn(2, 9, D * H)
    fast = compiled(layer)
    for _ in range(2):
        for module, run in ((layer, fast), (twin, twin)):
            module.zero_grad()
            run(x).square().sum().backward()
        assert layer.pos_encoding.step == twin.pos_encoding.step
        for p, wanted in zip(layer.parameters(), twin.parameters(), strict=True):
            assert_within(p.grad, wanted.grad, 1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_operators(gated):
    encoding = _encoding(gated=gated)
    x, positions = make_inputs(2, 5, H, D, 1)[0], _positions("own", 2, 5)
    constant = torch.randn(H, D, 7, dtype=torch.float64) if gated else None
    args = (x, positions, encoding.weight_q.detach(), constant)
    args += (torch.tensor(1), torch.tensor(2), 0, 7)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.fastpe.conv_features.default, args, test_utils=tests)
    grad = torch.randn(2, 5, H, 7, dtype=torch.float64)
    for needs in ([True, True, gated], [False, True, False], [True, False, False]):
        torch.library.opcheck(
            torch.ops.fastpe.conv_features_backward.default, (grad, *args, needs), test_utils=tests
        )


def test_no_code_is_kept():
    """T15: the gradient needs the tokens and the parameters, all else is made again."""
    encoding, kept = _encoding(num_realizations=40), []
    x = leaf(make_inputs(2, 200, H, D, 1)[0])

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoding.features(x, torch.arange(200).double().view(1, 200, 1), "q")
    # of a code there are 200 H D R numbers
    assert max(kept) == x.numel()


def test_half_precision():
    """Arithmetic is float32, rounded at the ends."""
    encoding = _encoding().float()
    x, positions = make_inputs(1, 9, H, D, 1, torch.bfloat16)[0], _positions("time", 1, 9)
    y = encoding.features(x, positions, "q")
    assert torch.equal(y, encoding.features(x.float(), positions, "q").bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be a positive int, got 0"),
        ({"num_realizations": 0}, "num_realizations must be a positive int"),
        ({"num_heads": None}, "num_heads must be a positive int, got None"),
        ({"gated": 1}, "gated must be True or False, got 1"),
        ({"resample": "always"}, "resample must be"),
        ({"seed": 2**63}, "seed must be an int of 64 bits"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fastpe.ConvSPE(**({"head_dim": 4, "num_heads": 2} | options))
