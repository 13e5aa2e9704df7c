"""One sequence over several ranks gives what one process gives."""

import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import encodings
from helpers import Problem, assert_within, leaf, make_inputs
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

import fastpe
from fastpe import ConvSPE, Favor, FStripe, SineSPE
from fastpe.distributed import _merge, causal_linear_attention
from fastpe.nn import CausalLinearAttention

# where slices end, of 37 tokens: of no token and of one
ENDS = {2: (0, 10, 37), 4: (0, 9, 9, 36, 37)}


@pytest.fixture(params=["reference", "cpu"])
def either(request):
    """The reference, and the native backend."""
    return (
        "reference" if request.param == "reference" else request.getfixturevalue("native_kernels")
    )


def _ends(group):
    return ENDS[dist.get_world_size(group)][dist.get_rank(group) :][:2]


def _run(group, problem, backend):
    """Return a rank's part of the results: their sum over ranks is the result."""
    size = dist.get_world_size(group)
    begin, end = _ends(group)

    def attend(q, k, v, *, positions, **options):
        here = slice(begin, end)
        if positions is not None:
            positions = positions[:, here]
        inputs = (x[:, here] for x in (q, k, v))
        o, final = causal_linear_attention(*inputs, group=group, positions=positions, **options)
        assert final.length == q.shape[1] + (0 if problem.state is None else problem.state.length)
        o = pad(o, (0, 0, 0, 0, begin, q.shape[1] - end))
        # every rank has the final state
        return o, final._replace(s=final.s / size, z=final.z / size)

    found = problem.run(backend, function=attend)
    return {name: x.detach() for name, x in found.items()}


def _check(ranks, size, problem, backend):
    parts = ranks(size, _run, problem, backend)
    problem.check({name: sum(part[name] for part in parts) for name in parts[0]})


def test_output_state_and_every_gradient(ranks, either, make_encoding):
    for size in ENDS:
        _check(ranks, size, Problem(make_encoding(8, 2)), either)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    "make", encodings("none", "rope", "ropepool", "sinespe", "fstripe-pooled", "custom")
)
def test_default_positions_go_on_over_ranks(ranks, either, make, state):
    _check(ranks, 4, Problem(make(8, 2), positions=None, state=state), either)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"normalize": "abs", "feature_map": "identity"},
        {"feature_map": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", encodings("rope", "sinespe"))
def test_options(ranks, either, make, options):
    _check(ranks, 4, Problem(make(8, 2), **options), either)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_narrow_dtypes(ranks, either, make, dtype):
    _check(ranks, 2, Problem(make(8, 2), dtype), either)


def _like_whole(group, feature_map, encoding, heads, backend):
    """Compare a slice and its gradients with those of one process."""
    inputs = make_inputs(2, 37, 2, 8, 6)
    inputs = inputs[0], *(x[:, :, :heads] for x in inputs[1:])
    options = {"feature_map": feature_map, "pos_encoding": encoding, "backend": backend}
    whole, leaves = ([leaf(x) for x in inputs] for _ in range(2))
    here = slice(*_ends(group))
    o, end = fastpe.causal_linear_attention(*whole, output_final_state=True, **options)
    part, final = causal_linear_attention(
        *(x[:, here] for x in leaves), group=group, output_final_state=True, **options
    )
    assert_within(part, o[:, here], 1e-11)
    for name in ("s", "z", "c"):
        if getattr(end, name) is not None:
            assert_within(getattr(final, name), getattr(end, name), 1e-11, name)
    wanted = torch.autograd.grad(o.square().sum(), whole)
    found = torch.autograd.grad(part.square().sum(), leaves)
    for actual, expected in zip(found, wanted, strict=True):
        dist.all_reduce(actual, group=group)
        assert_within(actual, expected, 1e-11, "gradient")


@pytest.mark.parametrize("feature_map", [lambda: Favor(8, seed=1), lambda: "taylor2"])
@pytest.mark.parametrize("make", encodings("none", "rope-before"))
def test_feature_maps_that_are_modules(ranks, either, make, feature_map):
    ranks(4, _like_whole, feature_map(), make(8, 2), 2, either)


@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_heads_that_share_keys(ranks, either, make):
    encoding = make(8, 2)
    ranks(2, _like_whole, "elu1", encoding and encoding.double(), 1, either)


def test_convspe(ranks, either):
    encoding = ConvSPE(8, 2, kernel_size=5, num_realizations=8, seed=1).double()
    ranks(4, _like_whole, "elu1", encoding, 2, either)


def _count(group, lengths, encoding, backend):
    """Return numbers that a rank sends, by collective, in a forward and a backward."""
    rank, sent = dist.get_rank(group), {}

    def counted(collective, x):
        def call(*args, **kwargs):
            name, size = collective.__name__, dist.get_world_size(group)
            # to each other rank: all that is gathered, or one part of what is exchanged
            numbers = args[x].numel() // (size if name == "all_to_all_single" else 1)
            sent.setdefault(name, []).append(numbers)
            return collective(*args, **kwargs)

        return call

    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        for name in dir(dist):
            if name.startswith(
                ("all_", "broadcast", "gather", "reduce", "scatter", "send", "recv")
            ):
                patch.setattr(dist, name, counted(getattr(dist, name), 1))
        q, k, v = (x.requires_grad_() for x in make_inputs(2, lengths[rank], 3, 8, 6))
        o, state = causal_linear_attention(
            q, k, v, group=group, pos_encoding=encoding, output_final_state=True, backend=backend
        )
        (o.sum() + state.s.sum()).backward()
    return sent


@pytest.mark.parametrize("make", encodings("none", "ropepool", "sinespe"))
def test_what_is_sent_does_not_depend_on_the_length(ranks, native_kernels, make):
    encoding = make(8, 3)
    r, rz = (8, 8) if encoding is None else (encoding.feature_dim, encoding.norm_dim)
    state = 2 * 3 * (r * 6 + rz)
    wanted = {"all_gather": [12, state], "all_to_all_single": [state]}
    for lengths in ((5, 3), (500, 300)):
        assert ranks(2, _count, lengths, encoding, native_kernels) == [wanted] * 2


def _twice(group, encoding, backend):
    q, k, v = (x.requires_grad_() for x in make_inputs(2, 9, 3, 8, 6, torch.float32))
    found = []
    for _ in range(2):
        o, state = causal_linear_attention(
            q, k, v, group=group, pos_encoding=encoding, output_final_state=True, backend=backend
        )
        grads = torch.autograd.grad(o.square().sum() + state.z.sum(), (q, k, v))
        found.append([x.detach() for x in (state.s, state.z, o, *grads)])
    return found


@pytest.mark.parametrize("make", encodings("rope", "sinespe"))
def test_bitwise_the_same(ranks, either, make):
    """From call to call; and the final state on all ranks."""
    found = ranks(4, _twice, make(8, 3), either)
    for first, second in found:
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, first[:2], found[0][0][:2]))


# disagreement


def _refused(group, change):
    encoding = SineSPE(8, 3, num_sines=2, num_realizations=8, seed=1)
    inputs = {"b": 2, "dtype": torch.float32}
    options = {"pos_encoding": encoding, "group": group}
    grad = True
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        if change == "noise":
            encoding.resample_()
        elif change == "grad":
            grad = False
        elif change in inputs:
            inputs[change] = {"b": 1, "dtype": torch.float64}[change]
        else:
            options |= {change: {"eps": 1e-3, "feature_map": "relu", "pos_encoding": None}[change]}
    b, dtype = inputs.values()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError) as refusal:  # noqa: PT011
        causal_linear_attention(*make_inputs(b, 4, 3, 8, 6, dtype), **options)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "noise",
            "noise of pos_encoding and feature_map, seed and step must be the same on every rank",
        ),
        ("b", "B, H, D, Hk and E must be the same on every rank, got"),
        ("dtype", "dtypes and options must"),
        ("eps", "dtypes and options must"),
        ("feature_map", "dtypes and options must"),
        ("pos_encoding", "dtypes and options must"),
        ("grad", "whether keys, values, positions or parameters require grad must"),
    ],
)
def test_disagreement_is_refused_on_all_ranks(ranks, change, message):
    refusals = ranks(4, _refused, change)
    assert len(set(refusals)) == 1
    assert message in refusals[0]


def _broadcast(group):
    torch.manual_seed(dist.get_rank(group))
    encoding = FStripe(8, 3, num_realizations=8)
    with torch.no_grad():
        for x in (*encoding.parameters(), *encoding.buffers()):
            dist.broadcast(x, src=0, group=group)
    q, k, v = make_inputs(2, 4, 3, 8, 6, torch.float32)
    return causal_linear_attention(q, k, v, group=group, pos_encoding=encoding)


def test_broadcast_buffers_agree(ranks):
    assert len(ranks(2, _broadcast)) == 2


def test_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        causal_linear_attention(*make_inputs(2, 4, 3, 8, 6))


def test_encodings_without_features_are_refused():
    encoding = ConvSPE(8, 3, num_realizations=None)
    with pytest.raises(ValueError, match="pos_encoding must have features"):
        causal_linear_attention(*make_inputs(2, 4, 3, 8, 6), pos_encoding=encoding.double())


# the layer


def _layer(make, backend):
    torch.manual_seed(3)
    layer = CausalLinearAttention(24, 3, pos_encoding=make(8, 3), backend=backend)
    return layer.double()


def _attend(layer, x, begin, end, how, **options):
    """Return the outputs of two training steps and the gradients of the second."""
    outputs = []
    for _ in range(2):
        layer.zero_grad()
        if how == "checkpoint":
            y = checkpoint(layer, x[:, begin:end], use_reentrant=False, **options)
        else:
            y = layer(x[:, begin:end], **options)
        y.square().sum().backward()
        outputs.append(y.detach())
    return outputs, [p.grad for p in layer.parameters()]


def _slice_of_layer(group, make, backend, how):
    layer = _layer(encodings(make)[0].values[0], backend)
    torch.manual_seed(dist.get_rank(group))  # noise does not depend on it
    begin, end = _ends(group)
    outputs, grads = _attend(layer, _tokens(), begin, end, how, group=group)
    for grad in grads:
        dist.all_reduce(grad, group=group)
    return outputs, grads


def _tokens():
    return make_inputs(2, 37, 1, 24, 1)[0][:, :, 0]


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
@pytest.mark.parametrize("name", ["none", "rope-learned", "sinespe"])
def test_training_of_the_layer(ranks, either, name, how):
    """Two steps with redrawn noise; sums over ranks are the gradients of parameters."""
    wanted, wanted_grads = _attend(
        _layer(encodings(name)[0].values[0], either), _tokens(), 0, 37, ""
    )
    found = ranks(2, _slice_of_layer, name, either, how)
    for step, whole in enumerate(wanted):
        assert_within(torch.cat([outputs[step] for outputs, _ in found], 1), whole, 1e-11)
    for grad, whole in zip(found[0][1], wanted_grads, strict=True):
        assert_within(grad, whole, 1e-11, "dparameter")


def _compiled(group, backend):
    warnings.simplefilter("ignore")  # Dynamo looks at the grad of what is no leaf
    layer, x = _layer(encodings("sinespe")[0].values[0], backend).eval(), _tokens()
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        layer.zero_grad()
        y = run(x, group=group)
        y.sum().backward()
        found.append([y.detach(), layer.in_proj.weight.grad])
    return found


def test_compiled_layer(ranks, native_kernels):
    (plain, compiled), *_ = ranks(1, _compiled, native_kernels)
    for actual, expected in zip(compiled, plain, strict=True):
        assert_within(actual, expected, 1e-11)


# states with a stabiliser


def test_states_with_exponents_merge():
    """exp(c) s and exp(c) z add up; nothing overflows; a slice without tokens has c = -inf."""
    s, z = torch.randn(5, 2, 3, 8, 6).double(), torch.rand(5, 2, 3, 8).double()
    c = torch.randn_like(z)
    c[1] = -torch.inf
    merged = _merge(s, z, c)
    grown = merged["c"].exp()
    assert_within(grown[..., None] * merged["s"], (c.exp()[..., None] * s).sum(0), 1e-14)
    assert_within(grown * merged["z"], (c.exp() * z).sum(0), 1e-14)
    for shift in (-1e4, 1e4):
        shifted = _merge(s, z, c + shift)
        assert_within(shifted["s"], merged["s"], 1e-10)
        assert torch.equal(shifted["c"], merged["c"] + shift)
    nothing = _merge(0 * s[1:2], 0 * z[1:2], c[1:2])
    assert not nothing["s"].any()
    assert not nothing["z"].any()
