"""The literature's systems: their definitions, causality, memories, hashes."""

import math

import baseline_oracle
import pytest
import torch
from baseline_oracle import DIRECT
from helpers import assert_within
from torch.nn import functional as F

from fastpe_lab.baselines import BASELINES
from fastpe_lab.baselines.compressive import Compressive
from fastpe_lab.baselines.reformer import Reformer
from fastpe_lab.baselines.transformer_xl import TransformerXL

B, H, D, L = 2, 2, 6, 2
# so small that 23 tokens are many blocks, and drop out of what is remembered
SMALL = {
    "shaw": {"max_distance": 5},
    "music-transformer": {"max_distance": 9},
    "music-transformer-local": {"block": 5},
    "transformer-xl": {"segment": 5},
    "stripe-srpe": {"max_difference": 2},
    "performer": {"num_features": 8, "seed": 0},
    "reformer": {"num_buckets": 4, "chunk": 3, "num_hashes": 3},
    "synthesizer": {"max_len": 30},
    "synthesizer-random": {"max_len": 30, "rank": 3},
    "linformer": {"max_len": 30, "rank": 4},
    "compressive-mean": {"memory": 4, "compressed": 5, "rate": 2},
    "compressive-max": {"memory": 4, "compressed": 5, "rate": 2},
    "compressive-conv": {"memory": 4, "compressed": 5, "rate": 2},
}
CAUSAL = [name for name, baseline in BASELINES.items() if baseline.causal]
COMPRESSIVE = [name for name in BASELINES if name.startswith("compressive")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name, **options):
    """Return a small module in float64, no parameter of which is zero."""
    module = BASELINES[name].make(D, H, L, **(SMALL.get(name, {}) | options)).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(length, heads=H, dim=D):
    """Return q, k, v and labels of two levels, some differences of which are clipped."""
    q, k, v = torch.randn(3, B, length, heads, dim, dtype=torch.float64)
    return q, k, v, torch.randint(6, (B, length, L))


def grads(o, leaves, do):
    return torch.autograd.grad(o, leaves, do, materialize_grads=True)


# what they compute


@pytest.mark.parametrize("length", [1, 3, 23])
@pytest.mark.parametrize("name", BASELINES)
def test_is_its_definition(name, length):
    module = make(name)
    q, k, v, positions = inputs(length)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = module(q, k, v, positions=positions)
    direct = DIRECT[name](module, q, k, v, positions)
    assert_within(o, direct, 1e-10)
    assert_within(module(q, k, v, positions=positions), o, 0)
    do = torch.randn_like(o)
    leaves += module.parameters()
    for at, (x, y) in enumerate(zip(grads(o, leaves, do), grads(direct, leaves, do), strict=True)):
        # the gradient of a logit that stands alone is a rounding error
        size = max(y.abs().max().item(), 1e-3)
        assert (x - y).abs().max().item() <= 1e-10 * size, f"gradient {at} of {name}"


@pytest.mark.parametrize("name", BASELINES)
def test_shapes_of_positions(name):
    """One level as [T], [B, T], [T, 1], [B, T, 1]; and only structured systems look at them."""
    module = BASELINES[name].make(D, H, **SMALL.get(name, {})).double().eval()
    q, k, v, positions = inputs(7)
    labels = positions[:1, :, 0]
    o = module(q, k, v, positions=labels[0])
    for same in (labels, labels[0, :, None], labels.expand(B, -1), labels[..., None]):
        assert torch.equal(module(q, k, v, positions=same), o)
    other = module(q, k, v, positions=positions[1, :, 0])
    assert torch.equal(o, other) == (not BASELINES[name].structured)
    if not BASELINES[name].structured:
        assert torch.equal(module(q, k, v), o)


def test_stripe_of_levels_is_not_their_sum():
    q, k, v, positions = inputs(9)
    module = make("stripe-ssrpe")
    swapped = module(q, k, v, positions=positions.flip(-1))
    assert (module(q, k, v, positions=positions) - swapped).abs().max() > 1e-3
    # shared by the batch
    one = module(q, k, v, positions=positions[0])
    assert_within(one[:1], module(q[:1], k[:1], v[:1], positions=positions[:1]), 1e-12)


# causality


@pytest.mark.parametrize("at", [0, 7, 10, 22])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_later_tokens(name, at):
    module = make(name)
    q, k, v, positions = inputs(23)
    changed = [x.clone() for x in (q, k, v, positions)]
    for x in changed[:3]:
        x[:, at] += torch.randn_like(x[:, at])
    changed[3][:, at] += 1
    with torch.no_grad():
        o, other = module(q, k, v, positions=positions), module(*changed)
        moved = (o - other).abs().amax((0, 2, 3))
        assert (moved[:at] <= 1e-12).all()
        assert moved[at] > 1e-6
        assert at == 22 or moved[at + 1 :].max() > 1e-6
        # nor on how many there are
        for length in (1, at, 13):
            parts = (x[:, :length] for x in (q, k, v, positions))
            assert (module(*parts) - o[:, :length]).abs().amax() <= 1e-12 if length else True


@pytest.mark.parametrize("name", [n for n in CAUSAL if BASELINES[n].structured])
def test_no_output_depends_on_later_labels(name):
    module = make(name)
    q, k, v, positions = inputs(23)
    changed = positions.clone()
    changed[:, 7, 1] += 1
    moved = (module(q, k, v, positions) - module(q, k, v, changed)).abs().amax((0, 2, 3))
    assert moved[:7].max() <= 1e-12
    assert moved[7] > 1e-6
    assert moved[8:].max() > 1e-6


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in CAUSAL])
def test_bidirectional_ones_cannot_be_causal(name):
    module = make(name)
    q, k, v, _ = inputs(23)
    o = module(q, k, v)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, -1] += 1
    assert (module(*changed) - o)[:, 0].abs().max() > 1e-3
    # a token cannot be given the past alone by hiding the rest: a prefix has outputs of its own
    prefix = module(*(x[:, :12] for x in (q, k, v)))
    hidden = [torch.cat((x[:, :12], torch.zeros_like(x[:, 12:])), 1) for x in (q, k, v)]
    assert (module(*hidden)[:, :12] - o[:, :12]).abs().max() > 1e-3
    if name == "fnet":
        # of zeros at the end every transform is another one
        assert (module(*hidden)[:, :12] - prefix).abs().max() > 1e-3
    else:
        # zeros add nothing to sums over tokens, but token 0 then sees tokens 1 ... 11
        first = module(*(x[:, :1] for x in (q, k, v)))
        assert (prefix - module(*hidden)[:, :12]).abs().max() < 1e-12
        assert (first - prefix[:, :1]).abs().max() > 1e-3


def test_transformers_own_lsh_attention_is_not_causal():
    """Why there is a Reformer here: a chunk of the sorted sequence moves with later tokens."""
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    config = ReformerConfig(
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=16,
        lsh_attn_chunk_length=16,
        num_buckets=8,
        num_hashes=1,
        is_decoder=True,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=1,
        attn_layers=["lsh"],
    )
    layer = reformer.LSHSelfAttention(config).double().eval()
    x = torch.randn(1, 128, 32, dtype=torch.float64)
    other = x.clone()
    other[:, -1] = 3 * torch.randn(32)
    with torch.no_grad():
        moved = layer(x).hidden_states - layer(other).hidden_states
    assert moved[:, :-1].abs().max() > 1e-3


# memories


@pytest.mark.parametrize("name", [n for n in BASELINES if BASELINES[n].remembers])
def test_memory_made_by_the_layer(name):
    """Keys and values given as memory change nothing but where gradients go."""
    module = make(name)
    q, k, v, _ = inputs(23)
    memory = tuple(x.clone().requires_grad_() for x in (k, v))
    o = module(q, k, v, memory=memory)
    assert torch.equal(o, module(q, k, v))
    first, second = torch.autograd.grad(o.square().sum(), memory)
    assert first.any()
    assert second.any()
    # what is never older than a segment is never remembered
    size = module.segment if name == "transformer-xl" else module.memory
    assert not first[:, 23 // size * size :].any()
    other = tuple(torch.randn_like(x) for x in (k, v))
    assert (module(q, k, v, memory=other) - o)[:, size:].abs().max() > 1e-3
    assert_within(module(q, k, v, memory=other)[:, :size], o[:, :size], 1e-12)


def _seen(module, length, i):
    """Return which values output i depends on, [T]."""
    q, k, v = torch.randn(3, 1, length, 1, 2, dtype=torch.float64)
    memory = tuple(x.clone().requires_grad_() for x in (k, v))
    v.requires_grad_()
    o = module(q, k, v, memory=memory)[:, i].sum()
    return sum(x.abs() for x in torch.autograd.grad(o, [v, memory[1]])).amax((0, 2, 3)) > 0


def test_transformer_xl_remembers_a_segment():
    module = TransformerXL(2, 1).double()
    seen = _seen(module, 2000, 1300)
    assert torch.equal(seen.nonzero().flatten(), torch.arange(512, 1301))


@pytest.mark.parametrize("kind", ["mean", "conv"])
def test_compressive_remembers_256_slots_of_four_tokens(kind):
    module = Compressive(2, 1, kind).double()
    # segment 20: the memory is tokens 1216 ... 1279, slots are 1216 - 4 * 256 = 192 ... 1215
    seen = _seen(module, 1400, 1290)
    assert torch.equal(seen.nonzero().flatten(), torch.arange(192, 1291))
    # no slot is dropped before there are 256
    assert _seen(module, 1100, 1090)[:1091].all()


def test_compressive_cannot_tell_four_old_tokens_apart():
    module = Compressive(2, 1, "mean").double()
    q, k, v = torch.randn(3, 1, 300, 1, 2, dtype=torch.float64)

    def moved(first, second):
        order = torch.arange(300)
        order[[first, second]] = order[[second, first]]
        return (module(q, k[:, order], v[:, order]) - module(q, k, v))[:, 256:].abs().max()

    assert moved(100, 103) <= 1e-12
    assert moved(103, 104) > 1e-6
    # the memory itself is not compressed
    assert moved(200, 203) > 1e-6


@pytest.mark.parametrize("name", COMPRESSIVE)
def test_reconstruction_teaches_the_compression_alone(name):
    module = make(name)
    q, k, v, _ = inputs(23)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for length in (3, 4, 5, 23):
        module(*(x[:, :length] for x in leaves))
        direct = baseline_oracle.reconstruction(module, *(x[:, :length] for x in leaves))
        assert_within(module.auxiliary_loss, direct, 1e-10)
    assert module.auxiliary_loss > 0
    if name != "compressive-conv":
        assert not module.auxiliary_loss.requires_grad
        return
    o, loss = module(*leaves), module.auxiliary_loss
    (exact,) = torch.autograd.grad(direct, [module.filters])
    loss.backward(retain_graph=True)
    assert_within(module.filters.grad, exact, 1e-10)
    trained = [n for n, p in module.named_parameters() if p.grad is not None]
    assert trained == ["filters"]
    assert all(x.grad is None for x in leaves)
    module.zero_grad()
    o.sum().backward()
    assert module.filters.grad is None
    with torch.no_grad():
        module(*leaves)
    assert module.auxiliary_loss is None


# hashes


def _one_bucket(module, x):
    """Return q that the module has in one bucket, and make it so."""
    module.rotations.fill_(1.0)
    return x.abs() + 0.1


def _shared(q, v):
    """Causal attention of shared queries and keys; oneself only where there is nothing else."""
    length = q.shape[1]
    logits = torch.einsum("bthd,bshd->bhts", q, F.normalize(q, dim=-1))
    logits = logits + torch.diag(torch.full((length,), -1e5, dtype=q.dtype))
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.einsum("bhts,bshe->bthe", logits.masked_fill(~mask, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("num_hashes", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_reformer_of_one_bucket_is_full_attention(length, num_hashes):
    module = Reformer(D, H, num_buckets=2, chunk=37, num_hashes=num_hashes).double()
    q, k, v, _ = inputs(length)
    q = _one_bucket(module, q)
    o = module(q, k, v)
    assert_within(o, _shared(q, v), 1e-10)
    # the first token has nothing but itself, the second nothing but the first
    assert_within(o[:, :2], v[:, :1].expand(-1, min(length, 2), -1, -1), 1e-12)
    if length > 4:
        short = Reformer(D, H, num_buckets=2, chunk=4, num_hashes=num_hashes).double()
        assert (short(_one_bucket(short, q), k, v) - o).abs().max() > 1e-3


def test_reformer_hashes():
    module = Reformer(D, H, num_buckets=8, num_hashes=3)
    q = torch.randn(B, 11, H, D)
    found = module.buckets(q)
    assert found.shape == (B, 3, H, 11)
    for b in range(B):
        for h in range(H):
            for t in range(11):
                exact = list(baseline_oracle.buckets(module, q[b, t, h].double())(h))
                assert found[b, :, h, t].tolist() == exact
    assert found.unique().numel() == 8
    # the opposite has the opposite bucket, the same direction the same one
    assert torch.equal(module.buckets(-q), (found + 4) % 8)
    assert torch.equal(module.buckets(3 * q), found)


# what they refuse


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("shaw", {"max_distance": 0}, "max_distance must be a positive int, got 0"),
        ("transformer-xl", {"segment": 2.5}, "segment must be a positive int, got 2.5"),
        ("compressive-mean", {"memory": 6, "rate": 4}, "memory must be a multiple of rate = 4"),
        ("reformer", {"num_buckets": 3}, "num_buckets must be even, got 3"),
    ],
)
def test_bad_sizes(name, options, said):
    with pytest.raises(ValueError, match=said):
        BASELINES[name].make(D, H, **options)


def test_bad_kind():
    with pytest.raises(ValueError, match="kind must be one of mean, max, conv, got 'median'"):
        Compressive(D, H, "median")


@pytest.mark.parametrize("name", [n for n in BASELINES if BASELINES[n].bounded])
def test_too_long(name):
    module = make(name, max_len=8)
    q, k, v, _ = inputs(9)
    with pytest.raises(ValueError, match="T must be at most max_len = 8, got 9"):
        module(q, k, v)


@pytest.mark.parametrize("name", [n for n in BASELINES if BASELINES[n].structured])
def test_bad_positions(name):
    module = make(name)
    q, k, v, positions = inputs(9)
    with pytest.raises(ValueError, match="positions must be given"):
        module(q, k, v)
    wanted = r"positions must be \[T, L\] or \[B, T, L\] with T = 9, L = 2"
    for bad in (positions[..., 0], positions[:, :8], positions[..., :1]):
        with pytest.raises(ValueError, match=wanted):
            module(q, k, v, positions=bad)
