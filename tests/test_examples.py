"""The examples that are worked: they run, and what they show is so."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within
from torch import nn

import fastpe


def _load(name):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, swap = _load("generate"), _load("swap_attention")


# swap_attention.py


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


# generate.py


def _model():
    torch.manual_seed(2)
    return generate.Model(dim=16, heads=2).double().eval()


def _prompts():
    return [generate.melody(key, 0, length) for key, length in ((0, 3), (5, 9), (11, 1))]


def test_prompts_of_different_lengths_are_each_alone():
    model, prompts = _model(), _prompts()
    logits, states = generate.prefill(model, prompts)
    tokens, last, _ = generate.generate(model, logits, states, 6, 0, 1)
    for b, prompt in enumerate(prompts):
        alone, end, _ = generate.generate(model, *generate.prefill(model, [prompt]), 6, 0, 1)
        assert torch.equal(alone[0], tokens[b])
        assert_within(end[0], last[b], 1e-11)
        # and as one pass over all of it says
        with torch.no_grad():
            whole, _ = model(torch.cat((prompt, alone[0]))[None])
        assert_within(end[0], whole[0, -1], 1e-11)


def test_generation_learns_and_resumes(tmp_path, capsys):
    """Two runs through a file are one run, and it plays on in key."""
    options, file = ["--temperature", "0"], str(tmp_path / "state.pt")
    generate.main([*options, "--tokens", "12", "--save", file])
    loss, *first, _ = capsys.readouterr().out.splitlines()
    assert float(loss.removeprefix("trained: loss ")) < 0.5
    saved = copy.deepcopy(torch.load(file, weights_only=True))
    generate.main([*options, "--tokens", "8", "--resume", file])
    *second, size = capsys.readouterr().out.splitlines()
    for row, (key, length) in enumerate(((0, 8), (4, 13), (7, 20))):
        notes = [generate.NOTES[pitch % 12] for pitch in generate.melody(key, length, 20).tolist()]
        assert f"{first[row]} {second[row]}".split() == notes
    assert [state.length.tolist() for state in saved["states"]] == [[20, 25, 32]] * 2
    assert "after [28, 33, 40] tokens" in size


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 2.0, -50.0]]).expand(500, -1)
    assert set(generate.sample(logits, 0, 1).tolist()) == {1}
    assert set(generate.sample(logits, 1.0, 2).tolist()) == {1, 2}
    assert set(generate.sample(logits, 5.0, 3).tolist()) == {0, 1, 2}
