"""The examples that are worked: they run, and what they show is so."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within
from torch import nn

import fastpe


def _load(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


swap = _load("swap_attention")


def test_swap_keeps_weights_and_calls():
    model = swap.GPT(dim=16, heads=2, length=12).double()
    tokens = torch.randint(swap.VOCABULARY, (2, 12))
    names = {p.data_ptr() for p in model.parameters()}
    layer = model.layers[0].self_attn
    wanted = fastpe.nn.CausalLinearAttention(16, 2, pos_encoding=fastpe.RoPE(8)).double()
    with torch.no_grad():
        wanted.in_proj.weight.copy_(layer.in_proj_weight)
        wanted.in_proj.bias.copy_(layer.in_proj_bias)
        wanted.out_proj.load_state_dict(layer.out_proj.state_dict())
        assert swap.swap_(model, fastpe.RoPE) == 2
        assert {p.data_ptr() for p in model.parameters()} == names
        x = torch.randn(2, 12, 16).double()
        assert_within(model.layers[0].self_attn(x, x, x, is_causal=True)[0], wanted(x), 1e-12)
        before = model.train()(tokens)
        # PyTorch's layers have a fused softmax for evaluation, which must not come back
        assert_within(model.eval()(tokens), before, 1e-12)
        tokens[:, -1] = (tokens[:, -1] + 1) % swap.VOCABULARY
        assert_within(model(tokens)[:, :-1], before[:, :-1], 1e-12)


def test_swap_keeps_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double()
    model = nn.ModuleList([layer]).eval()
    swap.swap_(model, fastpe.RoPE)
    x, mask = torch.randn(2, 7, 8).double(), torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        y = layer(x, src_mask=mask, src_key_padding_mask=padding)
        assert_within(y[1, :4], layer(x[1:, :4], src_mask=mask[:4, :4])[0], 1e-12)


def test_swap_refuses_what_is_not_causal_self_attention():
    layer = swap.SwappedAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x, y = torch.randn(2, 1, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert torch.equal(layer(x, x, x, attn_mask=mask)[0], layer(x, x, x, is_causal=True)[0])
    assert torch.equal(layer(x, x, x, attn_mask=mask < 0)[0], layer(x, x, x, is_causal=True)[0])
    for other in (None, mask.T, torch.zeros(5, 5)):
        with pytest.raises(ValueError, match="attn_mask must be the causal one"):
            layer(x, x, x, attn_mask=other)
    with pytest.raises(ValueError, match="query, key and value must be one tensor"):
        layer(x, y, y, is_causal=True)
    for options in ({"batch_first": False}, {"batch_first": True, "kdim": 4}):
        with pytest.raises(ValueError, match="mha must be batch_first"):
            swap.SwappedAttention(nn.MultiheadAttention(8, 2, **options))


def test_swap_trains(capsys):
    swap.main(["--length", "64", "--steps", "40"])
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("softmax: loss ")
    assert after.startswith("fastpe, 2 layers swapped: loss ")
    first, last = (float(word) for word in after.split(";")[0].split("loss ")[1].split(" -> "))
    assert last < first / 2
