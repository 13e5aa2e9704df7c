"""Noise: the generator, its keys, and when it is redrawn."""

import copy
import functools

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, make_inputs

from fastpe import Favor, FStripe, SineSPE, backends, causal_linear_attention
from fastpe.nn import CausalLinearAttention
from fastpe.ops import noise

NOISY = encodings("sinespe", "sinespe-ungated", "fstripe-sff", "convspe")


def _by_kernel(backend, seed, step, module, kind, shape, dtype=torch.float64, first=0):
    key = torch.tensor(seed), torch.tensor(step), module, kind
    return backends.load(backend).philox_normal(*key, shape, dtype, first)


def _python(seed, step, module, kind, shape, dtype=torch.float64, first=0):
    key = torch.tensor(seed), torch.tensor(step), module, kind
    return noise.philox_normal(*key, shape, dtype, first)


@pytest.fixture
def draw(backend):
    """The generator in PyTorch and those of the backends on every code path."""
    return _python if backend == "reference" else functools.partial(_by_kernel, backend)


def test_known_answers(draw):
    """T13: the vectors of docs/math.md, "Noise"."""
    first = draw(1234, 0, 0, noise.SINE, (1, 1, 4))
    wanted = [1.229155497, -1.616490416, 0.464621076, -1.560540540]
    assert first.flatten().tolist() == pytest.approx(wanted, abs=6e-10)
    gate = draw(1234, 7, 5, noise.GATE, (4, 1, 4))[3]
    wanted = [0.377228256, -0.009702196, 0.412221033, 0.171122600]
    assert gate.flatten().tolist() == pytest.approx(wanted, abs=6e-10)


@pytest.mark.parametrize(
    "key",
    [(0, 0, 0, 0), (1234, 3, 5, 1), (2**62 - 1, 2**31 + 7, 2**29 - 1, 3), (-5, 9, 1, 0)],
    ids=str,
)
def test_every_number_is_philox(draw, key):
    """Against Philox4x32-10 on Python integers; all 64 bits of the seed count."""
    seed, step, module, kind = key
    wanted = oracle.normal(seed % 2**64, step % 2**32, module, kind, 5, 3, 10)
    assert_within(draw(*key, (5, 3, 10)), wanted, 1e-14)
    assert_within(draw(*key, (5, 3, 10), torch.float32), wanted, 1e-7)


def test_prefix_stable(draw):
    """T13: a longer or wider draw begins with the shorter one, to the bit."""
    whole = draw(9, 2, 0, 0, (6, 7, 33))
    for shape in ((6, 7, 1), (6, 7, 32), (6, 3, 33), (2, 7, 33), (1, 1, 5)):
        part = draw(9, 2, 0, 0, shape)
        assert torch.equal(part, whole[: shape[0], : shape[1], : shape[2]])


@pytest.mark.parametrize("first", [0, 3, -2, 2**32 - 2, 2**40 + 5, -(2**31)])
def test_rows_from_any_on(draw, first):
    """The row of the counter is the index modulo 2^32, of either sign."""
    rows = [draw(9, 2, 0, noise.CONV, (3, 1, 6), first=first + j) for j in range(4)]
    assert torch.equal(draw(9, 2, 0, noise.CONV, (3, 4, 6), first=first), torch.cat(rows, 1))
    wanted = oracle.normal(9, 2, 0, noise.CONV, 3, range(first, first + 4), 6)
    assert_within(torch.cat(rows, 1), wanted, 1e-14)


def test_kernels_are_the_same_to_rounding(kernels):
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-7)):
        key = (2**40 + 17, 12, 3, noise.SINE, (4, 11, 66), dtype)
        assert _by_kernel(kernels, *key).dtype == dtype
        assert_within(_by_kernel(kernels, *key), _python(*key), tolerance)


def test_keys_are_independent(draw):
    """Each of seed, step, module and kind gives other numbers, standard normal ones."""
    draws = [
        draw(*key, (50, 10, 40))
        for key in ((1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1))
    ] + [draw(1 + 2**50, 0, 0, 0, (50, 10, 40))]
    n = draws[0].numel()
    for i, x in enumerate(draws):
        assert abs(x.mean()) < 5 / n**0.5
        assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
        for y in draws[:i]:
            assert abs((x * y).mean()) < 5 / n**0.5


# modules


def _attend(encoding, x, **options):
    q, k, v = x
    return causal_linear_attention(q, k, v, pos_encoding=encoding, **options)


@pytest.mark.parametrize("make", NOISY)
def test_seed_and_step_are_in_the_state_dict(backend, make):
    x = make_inputs(1, 9, 2, 8, 8, torch.float32)
    one, other = make(8, 2), make(8, 2)
    other.reseed_(one.seed + 1)
    assert {"seed_code", "step_code"} <= set(one.state_dict())
    one.resample_()
    one.resample_()
    before = _attend(one, x, backend=backend)
    assert not torch.equal(_attend(other, x, backend=backend), before)
    other.load_state_dict(one.state_dict())
    assert torch.equal(_attend(other, x, backend=backend), before)
    assert torch.equal(_attend(copy.deepcopy(one), x, backend=backend), before)
    assert torch.equal(other.noise_key, one.noise_key)
    other.resample_()
    assert not torch.equal(_attend(other, x, backend=backend), before)
    assert torch.equal(_attend(one, x, backend=backend), before)


@pytest.mark.parametrize(
    "seed", [0, 1, 7, -1, 2**63 - 1, -(2**63), 1234567890123456789, -987654321]
)
def test_every_seed_is_kept(seed):
    encoding = SineSPE(4, 1, seed=seed)
    assert encoding.seed == encoding.noise_key[0] == seed


def _ema(decay):
    return {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(decay)}


@pytest.mark.parametrize(
    "options", [{}, _ema(0.9), _ema(0.999), _ema(0.99999)], ids=["swa", "0.9", "0.999", "0.99999"]
)
@pytest.mark.parametrize("seed", [7, 2**61 + 12345, -(2**63)])
def test_averages_keep_the_seed(options, seed):
    """Of all buffers, of which torch averages whole numbers too, or of the state dict."""
    model = _layer(seed=seed, resample="never")
    model.pos_encoding.resample_()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True, **options)
    by_hand = copy.deepcopy(model)
    for _ in range(300):
        average.update_parameters(model)
        for mine, x in zip(by_hand.buffers(), model.buffers(), strict=True):
            mine.copy_(0.999 * mine + 0.001 * x)
    for found in (average.module, by_hand):
        assert torch.equal(found.pos_encoding.noise_key, model.pos_encoding.noise_key)


def test_averages_of_other_steps_keep_the_seed():
    model = _layer(seed=2**61 + 12345)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True, **_ema(0.9))
    for _ in range(20):
        model.pos_encoding.maybe_resample_()
        average.update_parameters(model)
    assert average.module.pos_encoding.seed == model.pos_encoding.seed
    assert 0 < average.module.pos_encoding.step <= 20


def test_state_dicts_of_before():
    """They had seed and step as they are."""
    layer = CausalLinearAttention(
        8, 2, pos_encoding=SineSPE(4, 2, resample=3), feature_map=Favor(8)
    )
    saved = {name: x for name, x in layer.state_dict().items() if not name.endswith("_code")}
    seeds = {"pos_encoding": (-(2**40) - 3, 7), "feature_map": (2**62 - 5, 4)}
    for part, (seed, step) in seeds.items():
        saved |= {f"{part}.seed": torch.tensor(seed), f"{part}.step": torch.tensor(step)}
    assert not any(layer.load_state_dict(saved))
    assert layer.pos_encoding.noise_key.tolist() == [-(2**40) - 3, 2]
    assert layer.feature_map.noise_key.tolist() == [2**62 - 5, 4]
    assert layer.pos_encoding.step == 7
    with pytest.raises(RuntimeError, match="step_code"):
        layer.load_state_dict({n: x for n, x in saved.items() if n != "feature_map.step"})


def test_copies_have_one_noise_until_they_are_seeded():
    """As parameters: stacks are made of copies of one layer, and averages of a model too."""
    layers = torch.nn.TransformerEncoder(_Encoder(), 3, enable_nested_tensor=False).layers
    encodings_of = [layer.pos_encoding for layer in layers]
    assert len({e.seed for e in encodings_of}) == 1
    for encoding in encodings_of[1:]:
        encoding.reseed_()
    assert len({e.seed for e in encodings_of}) == 3
    encodings_of[2].reseed_(5)
    assert encodings_of[2].noise_key.tolist() == [5, 0]
    for encoding in encodings_of:
        encoding.reset_parameters()
    assert len({e.seed for e in encodings_of}) == 3
    share = encodings_of[0].share()
    share.reseed_(8)
    assert encodings_of[0].seed == share.seed == 8


class _Encoder(CausalLinearAttention):
    def __init__(self):
        super().__init__(8, 2, pos_encoding=SineSPE(4, 2, num_realizations=8))


def test_default_seed_comes_from_torch():
    torch.manual_seed(3)
    first, second = SineSPE(4, 1), SineSPE(4, 1)
    torch.manual_seed(3)
    assert SineSPE(4, 1).seed == first.seed != second.seed
    assert SineSPE(4, 1, seed=7).seed == 7


def _layer(backend="reference", kind=SineSPE, **options):
    torch.manual_seed(5)
    options = {"num_sines": 2, "num_realizations": 8, "seed": 1} | options
    return CausalLinearAttention(8, 2, pos_encoding=kind(4, 2, **options), backend=backend)


def _keys(layer, n, x):
    keys = []
    for _ in range(n):
        layer(x)
        keys.append(layer.pos_encoding.noise_key[1].item())
    return keys


@pytest.mark.parametrize("kind", [SineSPE, FStripe])
def test_redraw_policy(kind):
    x = torch.randn(2, 5, 8)
    for resample in ("forward", 1):
        assert len(set(_keys(_layer(kind=kind, resample=resample), 6, x))) == 6
    every = _keys(_layer(kind=kind, resample=3), 9, x)
    assert len(set(every)) in (3, 4)
    assert max(every.count(key) for key in every) == 3
    assert every == sorted(every)
    never = _layer(kind=kind, resample="never")
    assert len(set(_keys(never, 4, x))) == 1
    assert torch.equal(never(x), never(x))
    layer = _layer(kind=kind)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert len(set(_keys(layer, 4, x))) == 1
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert len(set(_keys(layer, 4, x))) == 4


def test_training_goes_on_from_a_checkpoint():
    x = torch.randn(1, 5, 8)
    layer, resumed = _layer(), _layer()
    for _ in range(3):
        layer(x)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), resumed(x))
    assert torch.equal(layer(x), resumed(x))


def test_prefill_and_decode_use_one_noise(backend):
    """In training mode too: a sequence that goes on does not redraw."""
    layer = _layer(backend)
    x = torch.randn(2, 9, 8)
    layer.eval()
    whole = layer(x)
    layer.train()
    layer.pos_encoding.maybe_resample_ = lambda: None
    y, state = layer(x[:, :4], output_final_state=True)
    del layer.pos_encoding.maybe_resample_
    parts = [y]
    y, state = layer(x[:, 4:7], initial_state=state, output_final_state=True)
    parts.append(y)
    for t in (7, 8):
        y, state = layer.step(x[:, t], state)
        parts.append(y[:, None])
    assert_within(torch.cat(parts, 1), whole, 2e-5)


# sharing over layers


def test_sharing_over_layers():
    """One draw of the codes for all layers, gates of their own (docs/math.md, "SPE with sines")."""
    torch.manual_seed(0)
    source = SineSPE(4, 2, num_sines=2, num_realizations=8, seed=1)
    shares = [source.share(), source.share()]
    shares.append(shares[0].share())
    maps = [e.make_maps()[0] for e in (source, *shares)]
    for other in maps[1:]:
        assert torch.equal(other.freq, maps[0].freq)
        assert torch.equal(other.offset, maps[0].offset)
        assert torch.equal(other.noise[:, :, :-1], maps[0].noise[:, :, :-1])
    gates = [m.noise[:, :, -1] for m in maps]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(gates[i], gates[j])
    wanted = oracle.normal(1, 0, shares[1].module_id, noise.GATE, 8, 1, 8)
    assert_within(gates[2], wanted.view(2, 4, 8), 1e-7)
    assert [name for name, _ in shares[0].named_parameters(recurse=False)] == ["gate"]


def test_first_layer_redraws_for_all(backend):
    torch.manual_seed(0)
    source = SineSPE(4, 2, num_sines=2, num_realizations=8, seed=1)
    layers = torch.nn.Sequential(
        *(
            CausalLinearAttention(8, 2, pos_encoding=e, backend=backend)
            for e in (source, source.share(), source.share())
        )
    )
    x = torch.randn(2, 5, 8)
    encodings_of = [layer.pos_encoding for layer in layers]
    for step in (1, 2, 3):
        layers(x)
        assert [e.noise_key.tolist() for e in encodings_of] == [[1, step]] * 3
    names = [name for name, _ in layers.named_parameters() if "freqs" in name]
    assert names == ["0.pos_encoding.freqs"]
    layers.eval()
    twin = copy.deepcopy(layers)
    assert torch.equal(twin(x), layers(x))
    assert twin[1].pos_encoding.source is twin[0].pos_encoding
    with torch.no_grad():
        twin[0].pos_encoding.freqs.add_(1)
    assert torch.equal(
        twin[1].pos_encoding.make_maps()[1].freq, twin[0].pos_encoding.make_maps()[1].freq
    )
    layers.train()
    layers(x)
    twin.load_state_dict(layers.state_dict())
    layers.eval()
    assert torch.equal(twin(x), layers(x))


def test_noise_survives_inference_mode(backend):
    """What evaluation leaves behind can be trained on, and a module made there can be used."""
    q, k, v = make_inputs(1, 6, 2, 4, 4, torch.float32)
    encoding = SineSPE(4, 2, num_realizations=8, resample="never")
    with torch.inference_mode():
        before = _attend(encoding, (q, k, v), backend=backend)
    q.requires_grad_()
    o = _attend(encoding, (q, k, v), backend=backend)
    o.sum().backward()
    assert torch.equal(o, before)
    with torch.inference_mode():
        made_here = SineSPE(4, 2, num_realizations=8)
        assert _attend(made_here, (q, k, v), backend=backend).isfinite().all()


def test_state_belongs_to_its_noise():
    layer = _layer()
    x = torch.randn(1, 4, 8)
    _, state = layer(x, output_final_state=True)
    layer.pos_encoding.resample_()
    with pytest.raises(ValueError, match="noise"):
        layer.step(x[:, 0], state)
