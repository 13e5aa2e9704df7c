"""Models of transformers under autocast, where q and k are float32 and v is half, and in half."""

import copy

import pytest
import torch
from helpers import assert_close

pytest.importorskip("transformers", reason="pip install -e '.[transformers]'; not checked: it")

from tiny_models import CACHE, model_of, tokens_of
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastpe.integrations.transformers import StateCache, register

register()
KINDS = pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPTNeoX"])
HALF = {"device_type": "cpu", "dtype": torch.bfloat16}


def _plain(module, q, k, v, mask, **options):
    """The same attention by matrices, in which autocast casts what it casts."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    weight = (phi_q @ phi_k.mT).tril()
    o = (weight @ v) / (weight.sum(-1, keepdim=True) + 1e-6)
    return o.transpose(1, 2).to(v.dtype), None


AttentionInterface.register("plain-linear", _plain)
AttentionMaskInterface.register("plain-linear", lambda **options: None)


def _learn(model, x, name, *, half, dtype=torch.float32):
    """Return the loss and the gradients."""
    model = copy.deepcopy(model).to(dtype).train()
    model.set_attn_implementation(name)
    with torch.autocast(**HALF, enabled=half):
        loss = model(x, attention_mask=torch.ones_like(x), labels=x, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


@KINDS
def test_training_is_as_exact_as_plain_pytorch(kind):
    model, x = model_of(kind), tokens_of(2, 12)
    exact = _learn(model, x, "plain-linear", half=False, dtype=torch.float64)
    plain = _learn(model, x, "plain-linear", half=True)
    assert_close(_learn(model, x, "fastpe", half=True), exact, (plain,), torch.bfloat16)


def test_the_inputs_of_attention_are_mixed(monkeypatch):
    """Else the tests above would show nothing."""
    seen, attention = set(), ALL_ATTENTION_FUNCTIONS["fastpe"]

    def watched(module, q, k, v, *args, **options):
        seen.add((q.dtype, k.dtype, v.dtype))
        return attention(module, q, k, v, *args, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "watched", watched)
    _learn(model_of(), tokens_of(1, 5), "watched", half=True)
    assert seen == {(torch.float32, torch.float32, torch.bfloat16)}


@KINDS
@pytest.mark.parametrize("cache", [DynamicCache, StateCache])
def test_generation(kind, cache):
    """The logits of each new token are those of the whole sequence."""
    model, x = model_of(kind), tokens_of(2, 7)
    options = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(x)}
    options |= {"output_logits": True, "return_dict_in_generate": True, CACHE: cache()}
    with torch.autocast(**HALF):
        made = model.generate(x, **options)
    assert made.sequences.shape == (2, 13)
    kept = options[CACHE]
    if cache is StateCache:
        assert {x.dtype for layer in kept.layers for x in (layer.state.s, layer.state.z)} == {
            torch.float32
        }
    model.set_attn_implementation("plain-linear")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(made.sequences[:, :-1]).logits[:, 6:]
        with torch.autocast(**HALF):
            plain = model(made.sequences[:, :-1]).logits[:, 6:]
    logits = torch.stack(made.logits, 1)
    assert_close({"o": logits}, {"o": exact}, ({"o": plain},), torch.bfloat16)


@pytest.mark.parametrize("cache", [DynamicCache, StateCache])
def test_models_in_half_precision(cache):
    """Without autocast: all of the model in bfloat16."""
    model, x = model_of(dtype=torch.bfloat16).bfloat16(), tokens_of(2, 7)
    made = model.generate(x, do_sample=False, max_new_tokens=4, **{CACHE: cache()})
    assert made.shape == (2, 11)


def test_gradient_checkpointing():
    model, x = model_of(), tokens_of(2, 12)
    whole = _learn(model, x, "fastpe", half=True)
    # the name it had before transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    again = _learn(model, x, "fastpe", half=True)
    for name, gradient in whole.items():
        assert torch.equal(again[name], gradient), name


@KINDS
def test_trainer_in_bfloat16(kind, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed; not checked: Trainer")
    model, rows = model_of(kind), tokens_of(1, 5).repeat(4, 4)
    arguments = TrainingArguments(
        tmp_path, bf16=True, use_cpu=True, max_steps=8, learning_rate=5e-3, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2, losses
