"""A saved model comes back with the attention that it was trained with, or not at all."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers", reason="pip install -e '.[transformers]'; not checked: it")

from tiny_models import CACHE, GREEDY, SIZES, config_of, model_of, tokens_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import fastpe
from fastpe.integrations.transformers import StateCache, register

register()
register("saved-relu", feature_map="relu", eps=1e-3)
MAP = fastpe.Favor(32, seed=3)
register("saved-favor", feature_map=MAP)
ENTRY = {"name": "fastpe", "feature_map": "elu1", "normalize": True, "eps": 1e-6, "backend": "auto"}
REFUSED = "must be registered before the model is made, as its weights were trained with it"


def _load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def _logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a model with an attention, and returns where."""

    def save(name):
        model_of(attn_implementation=name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def forgotten(monkeypatch):
    """Return a function that takes back a `register`."""
    return lambda name: monkeypatch.delitem(AttentionInterface._global_mapping, name)


@pytest.mark.parametrize("name", ["fastpe", "saved-relu", "saved-favor"])
def test_a_saved_model_comes_back_with_its_attention(saved, name):
    x, path = tokens_of(2, 9), saved(name)
    wanted = _logits(model_of(attn_implementation=name), x)
    # many callers pass None where nothing was asked for
    for options in ({}, {"attn_implementation": None}):
        model = _load(path, **options)
        assert model.config._attn_implementation == name
        assert torch.equal(_logits(model, x), wanted)
    made = model.generate(x, **GREEDY, **{CACHE: StateCache()})
    assert torch.equal(made, model.generate(x, use_cache=False, **GREEDY))
    # and again: an entry that was read is written
    model.save_pretrained(path / "again")
    assert torch.equal(_logits(_load(path / "again"), x), wanted)


def test_the_entry(saved):
    config = json.loads((saved("fastpe") / "config.json").read_text())
    assert config["attn_implementation"] == "fastpe"
    assert config["fastpe"] == ENTRY
    config = json.loads((saved("saved-favor") / "config.json").read_text())
    assert config["fastpe"]["feature_map"] == MAP.signature
    assert config["fastpe"]["feature_map_state"]["seed"] == 3
    # none where fastpe has no part
    for other in (config_of(attn_implementation=None), model_of(attn_implementation="sdpa").config):
        assert not {"fastpe", "attn_implementation"} & set(other.to_dict())


def test_configurations_copied_and_written():
    for config in (config_of(), model_of().config):
        copies = [
            copy.deepcopy(config),
            LlamaConfig.from_dict(config.to_dict()),
            LlamaConfig(**config.to_dict()),
            LlamaConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
            LlamaConfig.from_dict(config.to_diff_dict()),
        ]
        for other in copies:
            assert other._attn_implementation == "fastpe"
            assert other.to_dict()["fastpe"] == ENTRY
            assert AutoModelForCausalLM.from_config(other).config._attn_implementation == "fastpe"


def test_what_runs_is_what_is_saved(tmp_path):
    model = model_of()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert _load(tmp_path).config._attn_implementation == "sdpa"
    model.set_attn_implementation("saved-relu")
    model.save_pretrained(tmp_path)
    assert _load(tmp_path).config._attn_implementation == "saved-relu"


def test_other_options_are_refused(tmp_path):
    """Each of those that decide about outputs; the backend is the machine's."""
    first = {"feature_map": "relu", "normalize": True, "eps": 1e-3}
    register("saved-options", **first)
    model_of(attn_implementation="saved-options").save_pretrained(tmp_path)
    for key, other in (("feature_map", "elu1"), ("normalize", "abs"), ("eps", 1e-6)):
        with pytest.warns(UserWarning, match="'saved-options' was registered with other arguments"):
            register("saved-options", **first | {key: other})
        wanted = rf"^{key} of attn_implementation 'saved-options' must be {first[key]!r}, .* got "
        wanted += rf"{other!r}: call .*register\('saved-options', feature_map='relu', normalize="
        with pytest.raises(ValueError, match=wanted):
            _load(tmp_path)
    with pytest.warns(UserWarning, match="registered with other arguments"):
        register("saved-options", backend="reference", **first)
    assert _load(tmp_path).config._attn_implementation == "saved-options"
    # by another name too, and on purpose
    named = _load(tmp_path, attn_implementation="saved-relu")
    assert named.config._attn_implementation == "saved-relu"
    with pytest.raises(ValueError, match=r"eps of .*'fastpe' must be 0\.001, .* got 1e-06"):
        _load(tmp_path, attn_implementation="fastpe")
    anew = _load(tmp_path, attn_implementation="fastpe", fastpe=None)
    assert anew.config.to_dict()["fastpe"] == ENTRY


def test_an_attention_that_is_not_registered_is_refused(saved, forgotten):
    path = saved("saved-relu")
    forgotten("saved-relu")
    wanted = rf"'saved-relu' {REFUSED} .*: call fastpe\.integrations\.transformers\.register"
    wanted += r"\('saved-relu', feature_map='relu', normalize=True, eps=0\.001\) first"
    for options in ({}, {"attn_implementation": None}):
        with pytest.raises(ValueError, match=wanted):
            _load(path, **options)
    config = AutoConfig.from_pretrained(path)
    with pytest.raises(ValueError, match=wanted):
        AutoModelForCausalLM.from_config(config)


def test_without_fastpe_transformers_refuses_the_model(saved, forgotten, monkeypatch):
    """What this package changed in transformers is taken back, as if it were not imported."""
    path = saved("saved-relu")
    forgotten("saved-relu")
    for owner, name in (
        (PreTrainedConfig, "to_dict"),
        (PreTrainedModel, "get_correct_attn_implementation"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    wanted = '^Specified `attn_implementation="saved-relu"` is not supported'
    with pytest.raises(ValueError, match=wanted):
        _load(path)


def test_softmax_on_purpose_is_warned_of_and_keeps_the_entry(saved, tmp_path):
    path = saved("saved-relu")
    with pytest.warns(UserWarning, match="is 'eager', but the weights were trained with fastpe's"):
        model = _load(path, attn_implementation="eager")
    # a tool that reads weights by way of softmax writes what they are
    model.save_pretrained(tmp_path / "again")
    assert _load(tmp_path / "again").config._attn_implementation == "saved-relu"
    with pytest.warns(UserWarning, match="is 'sdpa', but the weights were trained with fastpe's"):
        model.set_attn_implementation("sdpa")
    model.config.fastpe = None
    model.save_pretrained(tmp_path / "softmax")
    config = json.loads((tmp_path / "softmax" / "config.json").read_text())
    assert "fastpe" not in config
    assert "attn_implementation" not in config


def test_weights_trained_with_softmax_are_warned_of(saved):
    path = saved("sdpa")
    wanted = "has no entry `fastpe` .* trained with softmax must be trained again"
    with pytest.warns(UserWarning, match=wanted):
        _load(path, attn_implementation="fastpe")
    model = _load(path)
    with pytest.warns(UserWarning, match=wanted):
        model.set_attn_implementation("fastpe")
    # new weights are nobody's
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), attn_implementation="fastpe")


def test_an_entry_that_is_not_ours_is_refused(saved):
    path = saved("fastpe")
    for entry in ("fastpe", {"name": "fastpe"}):
        with pytest.raises(ValueError, match=r"config\.fastpe must be the entry .* got .*fastpe"):
            _load(path, fastpe=entry)


def test_noise_of_a_feature_map(tmp_path):
    register("saved-noise", feature_map=fastpe.Favor(32, seed=5))
    model_of(attn_implementation="saved-noise").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="registered with other arguments"):
        register("saved-noise", feature_map=fastpe.Favor(32, seed=6))
    wanted = r"^feature_map_state .* must be \{.*'seed': 5.*, got \{.*'seed': 6.*: call "
    with pytest.raises(ValueError, match=wanted):
        _load(tmp_path)


def test_parameters_of_a_feature_map(tmp_path):
    """Nobody saves them but the caller; a map without them is refused."""
    feature_map = fastpe.Hedgehog(16, 4)
    with pytest.warns(UserWarning, match=r"feature_map Hedgehog\(16, 4\) has parameters that belo"):
        register("saved-learned", feature_map=feature_map)
    with torch.no_grad():
        feature_map.weight.mul_(2)
    model = model_of(attn_implementation="saved-learned", num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    x = tokens_of(1, 5)
    fresh = fastpe.Hedgehog(16, 4).requires_grad_(False)
    with pytest.warns(UserWarning, match="registered with other arguments"):
        register("saved-learned", feature_map=fresh)
    wanted = r"feature_map_state .*'weight': 'torch.float32 \(4, 16, 16"
    with pytest.raises(ValueError, match=wanted):
        _load(tmp_path)
    fresh.load_state_dict(feature_map.state_dict())
    assert torch.equal(_logits(_load(tmp_path), x), _logits(model, x))


def _llava(implementation):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES))
    config._attn_implementation = implementation
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    "implementation",
    [
        "fastpe",
        {"text_config": "saved-relu"},
        {"": "fastpe", "text_config": "saved-relu", "vision_config": "sdpa"},
    ],
)
def test_parts_of_a_model(implementation, tmp_path, forgotten):
    def used(config):
        return [c._attn_implementation for c in (config, config.text_config, config.vision_config)]

    model = _llava(implementation)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert used(again.config) == used(model.config)
    name = used(model.config)[1]
    forgotten(name)
    with pytest.raises(ValueError, match=f"'{name}' {REFUSED}"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def _trainer(model, folder, data, **options):
    arguments = TrainingArguments(
        folder, use_cpu=True, bf16=True, max_steps=4, save_steps=2, seed=1, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


def test_checkpoints_of_trainer(tmp_path):
    """They load with their attention, and training goes on from them as if it had not stopped."""
    pytest.importorskip("accelerate", reason="accelerate is not installed; not checked: Trainer")
    data = [{"input_ids": row, "labels": row} for row in tokens_of(16, 12)]
    whole = model_of(attn_implementation="saved-relu")
    _trainer(whole, tmp_path, data).train()
    half = _load(tmp_path / "checkpoint-2")
    assert half.config._attn_implementation == "saved-relu"
    assert half.config.to_dict()["fastpe"]["eps"] == 1e-3
    trainer = _trainer(half, tmp_path / "again", data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for wanted, x in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(x, wanted)


def test_pipeline(saved):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast, pipeline

    path = saved("saved-relu")
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 32)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    generate = pipeline("text-generation", model=str(path), device="cpu")
    assert generate.model.config._attn_implementation == "saved-relu"
    options = {"do_sample": False, "max_new_tokens": 5}
    made = generate("w5 w7 w9", return_full_text=False, **options)
    wanted = model_of(attn_implementation="saved-relu").generate(
        torch.tensor([[5, 7, 9]]), **options
    )
    wanted = generate.tokenizer.decode(wanted[0, 3:], skip_special_tokens=True)
    assert made[0]["generated_text"].split() == wanted.split()
    assert len(wanted) > 3


# of peft, about what transformers 5.24 renamed
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_peft(saved, tmp_path):
    """Adapters on a model with its entry, merged and alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed; not checked: adapters")
    model, x = _load(saved("saved-relu")), tokens_of(2, 9)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wanted = _logits(model.eval(), x)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(_logits(again, x), wanted)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = _load(tmp_path / "merged")
    assert merged.config._attn_implementation == "saved-relu"
    torch.testing.assert_close(_logits(merged, x), wanted)


def test_names_that_transformers_reads_more_out_of():
    for name in ("sdpa", "eager", "flash_attention_2", "paged|fastpe", "fastpe/relu", "", None):
        with pytest.raises(ValueError, match=r"name must be of letters, .* got"):
            register(name)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers")
