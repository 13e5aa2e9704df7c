"""Hugging Face transformers with fastpe's attention: training, generation, refusals."""

import inspect
import subprocess
import sys

import oracle
import pytest
import torch
from helpers import assert_within, make_inputs

pytest.importorskip("transformers", reason="pip install 'fastpe[transformers]'; not checked: it")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastpe
from fastpe.integrations.transformers import StateCache, register

register()
# the argument of a model's forward, which transformers 5.24 renamed
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else None
CACHE = CACHE or "past_key_values"
GREEDY = {"do_sample": False, "max_new_tokens": 11}
# of logits: two orders of summation in float64
SAME = 1e-12


def _model(**options):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="fastpe",
    )
    for name, value in options.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).double().eval()


def _tokens(b, t, seed=0):
    return torch.randint(2, 32, (b, t), generator=torch.Generator().manual_seed(seed))


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


def test_options_of_register_are_checked():
    for options in ({"feature_map": "tanh"}, {"normalize": 2}, {"eps": -1}, {"backend": "tpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            register("never", **options)
    assert "never" not in ALL_ATTENTION_FUNCTIONS


def test_random_features_generate_from_a_state():
    """Favor's state has noise and a stabiliser besides."""
    register("fastpe-favor", feature_map=fastpe.Favor(32, seed=3))
    model, x = _model(), _tokens(2, 7)
    model.set_attn_implementation("fastpe-favor")
    options = GREEDY | {"num_beams": 3}
    wanted = model.generate(x, use_cache=False, **options)
    assert torch.equal(model.generate(x, **options, **{CACHE: StateCache()}), wanted)


def test_model_is_causal():
    model, x = _model(), _tokens(2, 12)
    with torch.no_grad():
        before = model(x).logits
        x[:, -1] = 2 + (x[:, -1] - 1) % 30
        after = model(x).logits
    assert_within(after[:, :-1], before[:, :-1], SAME)
    assert not torch.equal(after[:, -1], before[:, -1])


def test_model_learns():
    """A sequence of period 5, to a quarter of the loss of knowing nothing."""
    model = _model().float().train()
    x = _tokens(1, 5).repeat(2, 5)
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
    model, x, cache, parts = _model(), _tokens(2, 12), cache(), []
    with torch.no_grad():
        for piece in (slice(0, 5), slice(5, 8), *(slice(t, t + 1) for t in range(8, 12))):
            parts.append(model(x[:, piece], use_cache=True, **{CACHE: cache}).logits)
        assert_within(torch.cat(parts, 1), model(x).logits, SAME)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_is_the_same_with_any_cache(how):
    model, x = _model(), _tokens(2, 7)
    options = GREEDY | how
    wanted = model.generate(x, use_cache=False, **options)
    assert wanted.shape == (2 * how.get("num_return_sequences", 1), 18)
    assert torch.equal(model.generate(x, **options), wanted)
    assert torch.equal(model.generate(x, **options, **{CACHE: StateCache()}), wanted)


@pytest.mark.parametrize("cache", [DynamicCache, StateCache])
def test_padding_on_the_left_changes_nothing(cache):
    model, long, short = _model(), _tokens(1, 7), _tokens(1, 4, seed=1)
    wanted = torch.cat([model.generate(x, **GREEDY)[:, x.shape[1] :] for x in (long, short)])
    batch = torch.cat((long, torch.nn.functional.pad(short, (3, 0))))
    mask = (batch != 0).long()
    made = model.generate(batch, attention_mask=mask, **GREEDY, **{CACHE: cache()})
    assert torch.equal(made[:, 7:], wanted)


def test_a_conversation_goes_on_from_its_state():
    model, x, cache = _model(), _tokens(2, 7), StateCache()
    for _ in range(2):
        ones = torch.ones_like(x)
        wanted = model.generate(x, attention_mask=ones, **GREEDY)
        made = model.generate(x, attention_mask=ones, **GREEDY, **{CACHE: cache})
        assert torch.equal(made, wanted)
        x = torch.cat((made, _tokens(2, 3, seed=2)), 1)


def test_a_state_cache_does_not_grow():
    model, x, cache, sizes = _model(), _tokens(2, 9), StateCache(), set()
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
    model, x, cache = _model(), _tokens(2, 9), StateCache()
    with torch.no_grad():
        model(x[:, :8], use_cache=True, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        last = model(x[[1, 0], 8:], use_cache=True, **{CACHE: cache}).logits
        assert_within(last[:, 0], model(x[[1, 0]]).logits[:, -1], SAME)


def test_a_state_cache_is_refused_elsewhere():
    model, x = _model(), _tokens(1, 4)
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
    model, x = _model(attention_dropout=0.1), _tokens(1, 6)
    model(x)
    with pytest.raises(ValueError, match="attention dropout must be 0"):
        model.train()(x)


def test_masks_that_cannot_be_had_are_refused():
    model, x = _model(), _tokens(1, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="no masks but causal and padding: no sliding windows, pa"):
        model(x, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="keys that end with the last query: use StateCache or Dy"):
        model.generate(x, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="attention_mask must cover the 6 tokens so far, got 4"):
        model(x, attention_mask=torch.ones(1, 4), use_cache=True)


def test_without_transformers():
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    import fastpe.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs transformers >= 5.5: pip install 'fastpe[transformers]'" in done.stdout
