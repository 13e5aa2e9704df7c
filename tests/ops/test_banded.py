"""Attention to a band of lags, and exact ConvSPE by it, against sums over all pairs."""

import copy

import pytest
import torch
from helpers import assert_close, assert_within, leaf, make_inputs, results, traced

from fastpe import (
    ConvSPE,
    banded_attention,
    causal_linear_attention,
    causal_linear_attention_step,
    linear_attention,
)
from fastpe.nn import CausalLinearAttention
from fastpe.ops import banded as ops

B, T, H, D, E, KAPPA = 2, 23, 3, 5, 4, 6


def _kernel(taps=KAPPA, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(H, d, taps, generator=generator, dtype=torch.float64).to(dtype)


def _pairs(q, k, v, p, normalize, eps, first=0):
    """Return o by the T x T matrix; the first keys are of the state."""
    t, n = q.shape[1], k.shape[1]
    lag = torch.arange(t)[:, None] + first - torch.arange(n)
    seen = (lag >= 0) & (lag < p.shape[-1])
    by_pair = p[..., lag.clamp(0, p.shape[-1] - 1)] * seen  # [H, D, T, N]
    w = torch.einsum("bmhd,bnhd,hdmn->bhmn", q, k, by_pair)
    o = torch.einsum("bhmn,bnhe->bmhe", w, v)
    if not normalize:
        return o
    den = w.sum(-1).transpose(1, 2)[..., None]
    return o / torch.where(den.abs() > eps, den.abs(), eps)


def _results(run, tensors):
    leaves = {name: leaf(x) for name, x in tensors.items()}
    o = run(**leaves)
    return results(o if isinstance(o, dict) else {"o": o}, leaves)


def _inputs(t=T, d=D, dtype=torch.float64):
    return dict(zip("qkv", make_inputs(B, t, H, d, E, dtype), strict=True))


@pytest.mark.parametrize("normalize", ["abs", False])
@pytest.mark.parametrize("taps", [1, 2, KAPPA, T, T + 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("room", [2**18, 1], ids=["one-tile", "tiles"])
def test_output_and_gradients(monkeypatch, normalize, taps, dtype, room):
    """eps clamps some of the sums; lags reach beyond the sequence."""
    monkeypatch.setattr(ops, "_ROOM", room)
    options = {"normalize": normalize, "eps": 1.5}
    tensors = _inputs(dtype=dtype) | {"p": _kernel(taps, dtype=dtype)}
    actual = _results(lambda q, k, v, p: banded_attention(q, k, v, p, **options), tensors)
    wide = {name: x.double() for name, x in tensors.items()}
    exact = _results(lambda q, k, v, p: _pairs(q, k, v, p, **options), wide)
    plain = _results(lambda q, k, v, p: _pairs(q, k, v, p, **options), tensors)
    assert_close(actual, exact, [plain], dtype)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)], ids=str)
def test_few_tokens(shape):
    q, k, v = (x.requires_grad_() for x in make_inputs(*shape, H, D, E))
    o, state = banded_attention(q, k, v, _kernel(), output_final_state=True)
    assert o.shape == v.shape
    assert [x.shape for x in state] == [(shape[0], KAPPA - 1, H, n) for n in (D, E)]
    o.sum().backward()
    assert_within(o, _pairs(q, k, v, _kernel(), False, 0), 1e-12)


def test_state_is_the_last_keys_and_values():
    """What is cut in two attends as the whole, with the gradients of the state."""
    tensors = _inputs() | {"p": _kernel()}
    before = make_inputs(B, KAPPA - 1, H, D, E, seed=3)
    tensors |= {"k0": before[1], "v0": before[2]}

    def run(q, k, v, p, k0, v0):
        state, parts = (k0, v0), []
        for piece in (slice(0, 2), slice(2, 3), slice(3, 3), slice(3, None)):
            o, state = banded_attention(
                *(x[:, piece] for x in (q, k, v)), p, initial_state=state, output_final_state=True
            )
            parts.append(o)
        return {"o": torch.cat(parts, 1), "k1": state[0], "v1": state[1]}

    def pairs(q, k, v, p, k0, v0):
        k, v = torch.cat((k0, k), 1), torch.cat((v0, v), 1)
        o = _pairs(q, k, v, p, False, 0, first=KAPPA - 1)
        return {"o": o, "k1": k[:, 1 - KAPPA :], "v1": v[:, 1 - KAPPA :]}

    assert_close(_results(run, tensors), _results(pairs, tensors))


def test_gradcheck():
    q, k, v = make_inputs(1, 4, H, 2, 2)
    tensors = [leaf(x) for x in (q, k, v, _kernel(3, d=2))]
    assert torch.autograd.gradcheck(
        lambda *x: banded_attention(*x, normalize="abs", eps=0.3), tensors
    )
    grad = torch.autograd.grad(
        banded_attention(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad[0].sum(), tensors[1])


def test_half_precision_and_views():
    """Rounded at the ends only, whatever the strides."""
    q, k, v = (x.transpose(1, 2) for x in make_inputs(2, H, T, D, E, torch.bfloat16))
    wide = banded_attention(q.float(), k.float(), v.float(), _kernel(dtype=torch.float32))
    assert torch.equal(banded_attention(q, k, v, _kernel(dtype=torch.float32)), wide.bfloat16())


def test_no_weight_is_kept():
    """Memory is O(T): nothing of T kappa numbers is saved for the gradient."""
    kept, tensors = [], [x.requires_grad_() for x in (*_inputs(64).values(), _kernel(40))]

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        banded_attention(*tensors, normalize="abs")
    assert max(kept) <= B * (64 + 39) * H * max(D, E + 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_kernel": _kernel()[0]}, ValueError, "weight_kernel must be .3, 5, kappa., got"),
        ({"weight_kernel": _kernel()[..., :0]}, ValueError, "weight_kernel must have at least"),
        ({"weight_kernel": 3}, ValueError, "weight_kernel must be .* got int"),
        ({"normalize": True}, ValueError, "normalize must be 'abs' or False"),
        ({"eps": -1}, ValueError, "eps must be"),
        ({"q": None}, TypeError, "q must be a tensor"),
        ({"initial_state": (torch.ones(1), torch.ones(2))}, ValueError, "initial_state must be of"),
    ],
)
def test_bad_arguments(changes, error, message):
    given = _inputs() | {"weight_kernel": _kernel()} | changes
    with pytest.raises(error, match=message):
        banded_attention(**given)


def test_operators():
    q, k, v = make_inputs(2, 9, H, D, E)
    args = q[:, :4], k, v, _kernel()
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.fastpe.banded.default, args, test_utils=tests)
    for needs in ([True] * 4, [False, True, False, True]):
        backward = torch.ops.fastpe.banded_backward.default
        torch.library.opcheck(backward, (v[:, :4], *args, needs), test_utils=tests)


# exact ConvSPE


def _encoding(gated=True, **options):
    torch.manual_seed(1)
    return ConvSPE(D, H, kernel_size=KAPPA, num_realizations=None, gated=gated, **options).double()


def _exact(encoding, q, k, v, normalize, eps, s0=None):
    """Return o with C of docs/math.md, "SPE with sines" for every pair, from the parameters."""
    a, b = encoding.weight_q, encoding.weight_k
    p = torch.stack([(a[..., : KAPPA - lag] * b[..., lag:]).sum(-1) for lag in range(KAPPA)], -1)
    g = encoding.gate.sigmoid() if encoding.gated else torch.zeros(H, D, dtype=torch.float64)
    t = q.shape[1]
    lag = torch.arange(t)[:, None] - torch.arange(t)
    c = p[..., lag.clamp(0, KAPPA - 1)] * (lag < KAPPA)
    c = (1 - g)[..., None, None] * c + g[..., None, None]
    w = torch.einsum("bmhd,bnhd,hdmn->bhmn", q, k, c).tril()
    o, den = torch.einsum("bhmn,bnhe->bmhe", w, v), w.sum(-1).transpose(1, 2)[..., None]
    return o / torch.where(den.abs() > eps, den.abs(), eps) if normalize else o


def _attend(encoding, q, k, v, **options):
    given = {"feature_map": "identity", "pos_encoding": encoding} | options
    return causal_linear_attention(q, k, v, **given)


@pytest.mark.parametrize("normalize", ["abs", False])
@pytest.mark.parametrize("gated", [True, False])
def test_exact_convspe(backend, normalize, gated):
    """T3, and every gradient, those of the filters and of the gate included."""
    encoding = _encoding(gated)
    params = dict(encoding.named_parameters())
    options = {"normalize": normalize, "eps": 0.4}

    def run(function):
        leaves = {name: leaf(x) for name, x in _inputs().items()} | params
        o = function(encoding, *(leaves[name] for name in "qkv"), **options)
        return results({"o": o}, leaves)

    def attend(*args, **options):
        return _attend(*args, backend=backend, **options)

    assert_close(run(attend), run(_exact))


@pytest.mark.parametrize("normalize", ["abs", False])
@pytest.mark.parametrize("gated", [True, False])
def test_prefill_and_decode(backend, normalize, gated):
    """T5."""
    encoding = _encoding(gated)
    q, k, v = _inputs().values()
    options = {"normalize": normalize, "backend": backend}
    with torch.no_grad():
        whole, end = _attend(encoding, q, k, v, output_final_state=True, **options)
        parts, state = [], None
        for piece in (slice(0, 3), slice(3, 15)):
            o, state = _attend(
                *(encoding, q[:, piece], k[:, piece], v[:, piece]),
                initial_state=state,
                output_final_state=True,
                **options,
            )
            parts.append(o)
        for t in range(15, T):
            o, state = causal_linear_attention_step(
                *(q[:, t], k[:, t], v[:, t], state),
                pos_encoding=encoding,
                feature_map="identity",
                **options,
            )
            parts.append(o[:, None])
    assert_within(torch.cat(parts, 1), whole, 1e-11)
    assert_within(state.s, end.s, 1e-11, "s")
    assert_within(state.z, end.z, 1e-11, "z")
    assert state.length == T


def test_packed_sequences(backend):
    """Each as if it was alone; keys that heads share are each head's own."""
    encoding, lengths = _encoding(), (3, 0, T - 3)
    q, k, v = (x[:1] for x in _inputs().values())
    k, v, bounds = k[:, :, :1], v[:, :, :1], torch.tensor([0, 3, 3, T])
    options = {"normalize": False, "output_final_state": True, "backend": backend}
    with torch.no_grad():
        o, state = _attend(encoding, q, k, v, cu_seqlens=bounds, **options)
        for i, parts in enumerate(zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)):
            q_i, *kv = parts
            k_i, v_i = (x.expand(-1, -1, H, -1) for x in kv)
            alone, end = _attend(encoding, q_i, k_i, v_i, **options)
            assert_within(o[:, bounds[i] : bounds[i + 1]], alone, 1e-12)
            assert_within(state.s[i], end.s[0], 1e-12)
            assert_within(state.z[i], end.z[0], 1e-12)
    assert state.length.tolist() == list(lengths)


def test_padding(backend):
    """Padding does not count as a token between others, whatever it holds."""
    encoding, kept = _encoding(), torch.ones(B, T, dtype=torch.bool)
    kept[0, 4:7] = kept[1, :2] = kept[1, -1] = False
    inputs = [x.masked_fill(~kept[..., None, None], torch.nan) for x in _inputs().values()]
    options = {"normalize": "abs", "eps": 0.4, "output_final_state": True, "backend": backend}
    with torch.no_grad():
        o, state = _attend(encoding, *inputs, key_padding_mask=~kept, **options)
        assert (o[~kept] == 0).all()
        for i in range(B):
            alone, end = _attend(encoding, *(x[i : i + 1, kept[i]] for x in inputs), **options)
            assert_within(o[i][kept[i]], alone[0], 1e-12)
            assert_within(state.s[i], end.s[0], 1e-12)
            assert_within(state.z[i], end.z[0], 1e-12)
    assert state.length.tolist() == kept.sum(1).tolist()


def test_features_in_expectation():
    """The mean over noise of ConvSPE's linear attention is the exact one, within 5 sigma."""
    exact = _encoding()
    noisy = ConvSPE(D, H, kernel_size=KAPPA, num_realizations=64, seed=1).double()
    noisy.load_state_dict(exact.state_dict(), strict=False)
    q, k, v = (x[:1] for x in _inputs(9).values())
    draws = []
    with torch.no_grad():
        for _ in range(300):
            o = _attend(noisy, q, k, v, normalize=False, backend="reference")
            draws.append(o / (64 / D) ** 0.5)
            noisy.resample_()
        wanted = _attend(exact, q, k, v, normalize=False)
    draws = torch.stack(draws)
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / 300**0.5).all()


@traced
def test_layer_compiles_and_decodes(compiled):
    torch.manual_seed(2)
    encoding = ConvSPE(D, H, kernel_size=KAPPA, num_realizations=None)
    options = {"feature_map": "identity", "normalize": "abs", "eps": 1e-2}
    layer = CausalLinearAttention(D * H, H, pos_encoding=encoding, **options)
    twin, x = copy.deepcopy(layer), torch.randn(2, 9, D * H)
    for module, run in ((layer, compiled(layer)), (twin, twin)):
        run(x).square().sum().backward()
        assert module.pos_encoding.weight_q.grad.abs().max() > 0
    for p, wanted in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_within(p.grad, wanted.grad, 1e-4)
    with torch.no_grad():
        _, state = layer(x[:, :8], output_final_state=True)
        assert_within(layer.step(x[:, 8], state)[0], layer(x)[:, 8], 2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "elu1"}, "feature_map must be 'identity' with ConvSPE.*got 'elu1'"),
        ({"positions": torch.arange(T)}, "positions must be the default ones"),
    ],
)
def test_what_the_exact_form_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        _attend(_encoding(), *_inputs().values(), normalize=False, **options)
    with pytest.raises(ValueError, match="num_realizations must be given for features"):
        _encoding().features(_inputs()["q"], torch.zeros(1, T, 1), "q")
    with pytest.raises(ValueError, match="pos_encoding must have features here"):
        linear_attention(*_inputs().values(), pos_encoding=_encoding())


def test_a_state_of_another_form_is_refused():
    q, k, v = _inputs().values()
    options = {"normalize": False, "output_final_state": True}
    _, state = _attend(_encoding(), q, k, v, **options)
    with pytest.raises(ValueError, match="initial_state was made with"):
        _attend(_encoding(gated=False), q, k, v, initial_state=state, **options)
