"""Configurations of transformers' models that are small enough for tests."""

import inspect

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

# the argument of a model's forward, which transformers 5.24 renamed
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else None
CACHE = CACHE or "past_key_values"
GREEDY = {"do_sample": False, "max_new_tokens": 11}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def config_of(kind="Llama", **options):
    """Return a small configuration of a kind of model, with fastpe's attention unless told."""
    sizes = dict(SIZES)
    if kind == "GPTNeoX":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if kind == "GPT2":
        sizes = {"vocab_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        sizes |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "Bloom":
        sizes = {"vocab_size": 32, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    return getattr(transformers, f"{kind}Config")(
        **{**sizes, "attn_implementation": "fastpe", **options}
    )


def model_of(kind="Llama", **options):
    """Return a small model with fixed weights, in evaluation."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(kind, **options)).eval()


def tokens_of(b, t, seed=0):
    """Return tokens [b, t], none of them padding."""
    return torch.randint(2, 32, (b, t), generator=torch.Generator().manual_seed(seed))
