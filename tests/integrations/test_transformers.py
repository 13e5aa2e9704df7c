"""Hugging Face transformers with fastpe's attention: training, generation, refusals."""

import subprocess
import sys

import oracle
import pytest
import torch
from helpers import assert_within, make_inputs

pytest.importorskip("transformers", reason="pip install -e '.[transformers]'; not checked: it")

from tiny_models import CACHE, GREEDY, model_of, tokens_of
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastpe
from fastpe.integrations.transformers import StateCache, register

register()
# of logits: two orders of summation in float64
SAME = 1e-12


def _model(**options):
    return model_of(**options).double()


def _attend(name, q, k, v, mask=None, **options):
    # as a model calls it, [B, H, T, D]
    module = torch.nn.Module()
    module.is_causal = options.pop("is_causal", True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, mask, scaling=0.5, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tq", "padding"), [(9, 0), (9, 3), (4, 3), (1, 2)])
def test_is_the_formula(causal, tq, padding):
    """Grouped heads, the last query beside the last key, keys of padding ignored."""
    q, k, v = make_inputs(2, 9, 4, 8, 6)
    q, k, v = q[:, -tq:], k[:, :, ::2], v[:, :, ::2]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :padding] = False
    o, weights = _attend("fastpe", q, k, v, mask, is_causal=causal)
    assert weights is None
    phi_q, phi_k = oracle.content("elu1", q), oracle.content("elu1", k)
    weight = torch.einsum("bthd,bshd->bhts", phi_q, phi_k.repeat_interleave(2, 2))
    weight = weight * mask[:, None, None]
    if causal:
        weight = weight * (torch.arange(9) <= torch.arange(9 - tq, 9)[:, None])
    wanted = torch.einsum("bhts,bshe->bthe", weight, v.repeat_interleave(2, 2))
    assert_within(o, wanted / (weight.sum(-1).transpose(1, 2)[..., None] + 1e-6), 1e-12)


def test_options_of_register():
    register(feature_map="relu", normalize=False, name="fastpe-relu")
    q, k, v = make_inputs(1, 5, 2, 4, 4)
    o, _ = _attend("fastpe-relu", q, k, v)
    phi_q, phi_k = oracle.content("relu", q), oracle.content("relu", k)
    weight = torch.einsum("bthd,bshd->bhts", phi_q, phi_k).tril()
    assert_within(o, torch.einsum("bhts,bshe->bthe", weight, v), 1e-12)


def test_register_again():
    """The same arguments are nothing to warn of, also where each call makes a module."""
    for options in ({"feature_map": "dpfp"}, {"feature_map": fastpe.DPFP()}):
        register("fastpe-again", **options)
    with pytest.warns(UserWarning, match="'fastpe-again' was registered with other arguments"):
        register("fastpe-again", feature_map="dpfp", eps=1e-3)


def test_options_of_register_are_checked():
    for options in ({"feature_map": "tanh"}, {"normalize": 2}, {"eps": -1}, {"backend": "tpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            register("never", **options)
    assert "never" not in ALL_ATTENTION_FUNCTIONS


def test_random_features_generate_from_a_state():
    """Favor's state has noise and a stabiliser besides."""
    register("fastpe-favor", feature_map=fastpe.Favor(32, seed=3))
    model, x = _model(), tokens_of(2, 7)
    model.set_attn_implementation("fastpe-favor")
    options = GREEDY | {"num_beams": 3}
    wanted = model.generate(x, use_cache=False, **options)
    assert torch.equal(model.generate(x, **options, **{CACHE: StateCache()}), wanted)


def test_model_is_causal():
    model, x = _model(), tokens_of(2, 12)
    with torch.no_grad():
        before = model(x).logits
        x[:, -1] = 2 + (x[:, -1] - 1) % 30
        after = model(x).logits
    assert_within(after[:, :-1], before[:, :-1], SAME)
    assert not torch.equal(after[:, -1], before[:, -1])


def test_model_learns():
    """A sequence of period 5, to a quarter of the loss of knowing nothing."""
    model = _model().float().train()
    x = tokens_of(1, 5).repeat(2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4, losses


@pytest.mark.parametrize("cache", [DynamicCache, StateCache])
def test_logits_with_a_cache_are_those_without(cache):
    """A prompt in two pieces, then one token at a time."""
    model, x, cache, parts = _model(), tokens_of(2, 12), cache(), []
    with torch.no_grad():
        for piece in (slice(0, 5), slice(5, 8), *(slice(t, t + 1) for t in range(8, 12))):
            parts.append(model(x[:, piece], use_cache=True, **{CACHE: cache}).logits)
        assert_within(torch.cat(parts, 1), model(x).logits, SAME)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_is_the_same_with_any_cache(how):
    model, x = _model(), tokens_of(2, 7)
    options = GREEDY | how
    wanted = model.generate(x, use_cache=False, **options)
    assert wanted.shape == (2 * how.get("num_return_sequences", 1), 18)
    assert torch.equal(model.generate(x, **options), wanted)
    assert torch.equal(model.generate(x, **options, **{CACHE: StateCache()}), wanted)


@pytest.mark.parametrize("cache", [DynamicCache, StateCache])
def test_padding_on_the_left_changes_nothing(cache):
    model, long, short = _model(), tokens_of(1, 7), tokens_of(1, 4, seed=1)
    wanted = torch.cat([model.generate(x, **GREEDY)[:, x.shape[1] :] for x in (long, short)])
    batch = torch.cat((long, torch.nn.functional.pad(short, (3, 0))))
    mask = (batch != 0).long()
    made = model.generate(batch, attention_mask=mask, **GREEDY, **{CACHE: cache()})
    assert torch.equal(made[:, 7:], wanted)


def test_a_conversation_goes_on_from_its_state():
    model, x, cache = _model(), tokens_of(2, 7), StateCache()
    for _ in range(2):
        ones = torch.ones_like(x)
        wanted = model.generate(x, attention_mask=ones, **GREEDY)
        made = model.generate(x, attention_mask=ones, **GREEDY, **{CACHE: cache})
        assert torch.equal(made, wanted)
        x = torch.cat((made, tokens_of(2, 3, seed=2)), 1)


def test_a_state_cache_does_not_grow():
    model, x, cache, sizes = _model(), tokens_of(2, 9), StateCache(), set()
    with torch.no_grad():
        for t in range(9):
            model(x[:, t : t + 1], use_cache=True, **{CACHE: cache})
            sizes.add(tuple(layer.state.s.shape for layer in cache.layers))
    # of the heads of keys and values, which those of queries share
    assert sizes == {((2, 2, 16, 16),) * 2}
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = model(x, use_cache=True, **{CACHE: cache}).logits
        assert_within(again, model(x).logits, SAME)


def test_rows_of_a_state_cache():
    model, x, cache = _model(), tokens_of(2, 9), StateCache()
    with torch.no_grad():
        model(x[:, :8], use_cache=True, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        last = model(x[[1, 0], 8:], use_cache=True, **{CACHE: cache}).logits
        assert_within(last[:, 0], model(x[[1, 0]]).logits[:, -1], SAME)


def test_a_state_cache_is_refused_elsewhere():
    model, x = _model(), tokens_of(1, 4)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with pytest.raises((AttributeError, TypeError), match="StateCache holds no keys: it is fo"):
            model(x, use_cache=True, **{CACHE: StateCache()})
    cache = StateCache()
    model.set_attn_implementation("fastpe")
    model(x, use_cache=True, **{CACHE: cache})
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot be cropped: its sums do not tell tokens apart"):
        cache.crop(-1)


def test_what_linear_attention_cannot_do_is_refused():
    q, k, v = make_inputs(1, 5, 2, 4, 4)
    with pytest.raises(ValueError, match=r"dropout must be 0, .* got 0\.1"):
        _attend("fastpe", q, k, v, dropout=0.1)
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        with pytest.raises(ValueError, match=f"{name} must be None, as linear attention has no"):
            _attend("fastpe", q, k, v, **{name: 3})
    with pytest.raises(ValueError, match=r"must be \[B, Tk\], .* got shape \(1, 1, 5, 5\)"):
        _attend("fastpe", q, k, v, torch.ones(1, 1, 5, 5))


FULL = {"layer_types": ["full_attention"] * 2}
WINDOW = "takes causal masks and padding only, but the model asks for another mask: "
LAYERS = WINDOW + r"layer_types .* 'sliding_attention'; build the model with layer_types=\['full_at"
# a kind of model and its settings, what its error says, and the setting that it names
REFUSED = [
    ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0 in its", {"attention_dropout": 0}),
    ("GPT2", {}, r"must be 0, .* got 0\.1: build the model with attn_pdrop=0", {"attn_pdrop": 0}),
    ("Mistral", {}, WINDOW + "sliding_window .* is 4096; set it to None", {"sliding_window": None}),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}, LAYERS, FULL),
    ("Gemma2", {"attn_logit_softcapping": None}, LAYERS, FULL),
    (
        "Gemma2",
        FULL,
        r"softcap must be None, .* got 50\.0: set attn_logit_softcapping=None in",
        {"attn_logit_softcapping": None},
    ),
]


@pytest.mark.parametrize(("kind", "options", "message", "remedy"), REFUSED)
def test_refused_models_name_the_remedy(kind, options, message, remedy):
    """And it is one: the model then trains and generates."""
    x = tokens_of(2, 6)
    model = model_of(kind, **options).train()
    with pytest.raises(ValueError, match=message):
        model(x)
    model = model_of(kind, **options | remedy).train()
    model(x, labels=x).loss.backward()
    made = model.eval().generate(x, do_sample=False, max_new_tokens=3, **{CACHE: StateCache()})
    assert made.shape == (2, 9)


def test_models_with_attention_of_their_own_are_refused():
    """Bloom without a mask would be softmax that sees the future."""
    with pytest.raises(ValueError, match="through transformers' AttentionInterface, got Bloom"):
        model_of("Bloom")
    model = model_of("Bloom", attn_implementation="eager")
    model.set_attn_implementation("fastpe")
    assert model.config._attn_implementation == "eager"


def test_masks_that_cannot_be_had_are_refused():
    model, x = _model(), tokens_of(1, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"padding only, .*: packed sequences .* a row of its own"):
        model(x, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="keys that end with the last query: use StateCache or Dy"):
        model.generate(x, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="must cover the 6 tokens so far, got 4: add the"):
        model(x, attention_mask=torch.ones(1, 4), use_cache=True)


def test_without_transformers():
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    import fastpe.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs transformers >= 5.5: pip install -e '.[transformers]'" in done.stdout
