"""Packed and padded batches, shared heads, unequal lengths: each against what it stands for."""

import math

import oracle
import pytest
import torch
from conftest import encodings
from helpers import assert_within, gradients, make_inputs, make_positions, traced

import fastpe
from fastpe import causal_linear_attention, causal_linear_attention_step

LENGTHS = [5, 0, 1, 40, 7]
CU = torch.tensor(LENGTHS).cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0)
CU = torch.cat((CU, torch.tensor([sum(LENGTHS)])))
# padding of rows of 12 tokens: none, right, left, both sides and inside, everything
KEPT = ["xxxxxxxxxxxx", "xxxxx.......", ".......xxxxx", "..xx.xx.x...", "............"]
PADDING = torch.tensor([[c == "." for c in row] for row in KEPT])
PER_HEAD = "rope-learned", "ropepool", "sinespe", "fstripe-pooled", "fstripe-sff", "fstripe-vector"


def _leaves(encoding, *tensors):
    leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", tensors, strict=True)}
    parameters = {} if encoding is None else dict(encoding.named_parameters())
    return leaves, leaves | parameters


def _gradients(outputs, leaves):
    return gradients(dict(enumerate(outputs)), leaves)


def _double(make, head_dim, num_heads):
    encoding = make(head_dim, num_heads)
    return encoding if encoding is None else encoding.double()


def _cut(x, *index):
    return None if x is None else x[index]


def _states(encoding, count, heads, width, **options):
    """Return the state of some tokens of each of so many sequences."""
    q, k, v = make_inputs(count, 4, heads, width, 5, seed=3)
    with torch.no_grad():
        return causal_linear_attention(
            *(q, k, v),
            pos_encoding=encoding,
            positions=make_positions(encoding, count, 4, seed=3),
            output_final_state=True,
            backend="reference",
            **options,
        )[1]


def _pick(state, i):
    return state._replace(s=state.s[i : i + 1], z=state.z[i : i + 1])


@pytest.mark.parametrize("resumed", [False, True], ids=["start", "resumed"])
def test_packed_is_each_sequence_alone(backend, make_encoding, resumed):
    """To the last bit: outputs, states, and gradients of the tokens."""
    encoding = _double(make_encoding, 8, 2)
    q, k, v = make_inputs(1, sum(LENGTHS), 2, 8, 5)
    positions = make_positions(encoding, 1, sum(LENGTHS))
    state = _states(encoding, len(LENGTHS), 2, 8) if resumed else None
    options = {"pos_encoding": encoding, "output_final_state": True, "backend": backend}
    leaves, wanted = _leaves(encoding, q, k, v)
    o, end = causal_linear_attention(
        *leaves.values(), positions=positions, cu_seqlens=CU, initial_state=state, **options
    )
    alone, ends = [], []
    parts, wanted_alone = _leaves(encoding, q, k, v)
    for i in range(len(LENGTHS)):
        tokens = slice(CU[i], CU[i + 1])
        part, last = causal_linear_attention(
            *(x[:, tokens] for x in parts.values()),
            positions=_cut(positions, slice(None), tokens),
            initial_state=state and _pick(state, i),
            **options,
        )
        alone.append(part)
        ends.append(last)
    assert torch.equal(o, torch.cat(alone, 1))
    before = 4 if resumed else 0
    assert end.length.tolist() == [before + n for n in LENGTHS]
    together = [torch.cat([getattr(x, name) for x in ends]) for name in "sz"]
    assert torch.equal(end.s, together[0])
    assert torch.equal(end.z, together[1])
    grads = _gradients((o, end.s, end.z), wanted)
    expected = _gradients((torch.cat(alone, 1), *together), wanted_alone)
    for name, x in grads.items():
        if name[1:] in leaves:
            assert torch.equal(x, expected[name]), name
        else:
            assert_within(x, expected[name], 1e-11, name)


@pytest.mark.parametrize("make", encodings("rope", "ropepool", "sinespe", "fstripe-pooled"))
def test_positions_begin_anew_in_each_sequence(backend, make):
    encoding = _double(make, 8, 2)
    q, k, v = make_inputs(1, sum(LENGTHS), 2, 8, 5)
    options = {"pos_encoding": encoding, "cu_seqlens": CU.int(), "backend": backend}
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    expected = causal_linear_attention(q, k, v, positions=positions, **options)
    assert torch.equal(causal_linear_attention(q, k, v, **options), expected)


@pytest.mark.parametrize("kind", ["packed", "padded", "rows"])
@pytest.mark.parametrize("make", encodings("rope", "ropepool", "sinespe", "fstripe-pooled"))
def test_positions_go_on_from_each_state(backend, make, kind):
    """Every sequence counts on from its own length."""
    encoding = _double(make, 8, 2)
    more, start = {}, torch.tensor([4, 11, 0, 7, 2])
    if kind == "packed":
        q, k, v = make_inputs(1, sum(LENGTHS), 2, 8, 5)
        more["cu_seqlens"] = CU
        positions = torch.cat([s + torch.arange(n) for s, n in zip(start, LENGTHS, strict=True)])
    else:
        q, k, v = make_inputs(*PADDING.shape, 2, 8, 5)
        positions = start[:, None] + torch.arange(PADDING.shape[1])
        if kind == "padded":
            more["key_padding_mask"] = PADDING
            positions = start[:, None] + (~PADDING).cumsum(1) - 1
    state = _states(encoding, 5, 2, 8)._replace(length=start)
    options = {"pos_encoding": encoding, "initial_state": state, "backend": backend} | more
    expected = causal_linear_attention(q, k, v, positions=positions, **options)
    assert torch.equal(causal_linear_attention(q, k, v, **options), expected)


def _padded_case(encoding, heads, fill, given):
    b, t = PADDING.shape
    q, k, v = make_inputs(b, t, heads, 8, 5)
    for x in (q, k, v):
        x[PADDING] = fill
    return q, k, v, make_positions(encoding, b, t) if given else None


@pytest.mark.parametrize("given", [False, True], ids=["time", "structure"])
@pytest.mark.parametrize("resumed", [False, True], ids=["start", "resumed"])
def test_padding_is_not_there(backend, make_encoding, given, resumed):
    """Outputs, states and gradients are those without it, though it holds NaN."""
    encoding = _double(make_encoding, 8, 2)
    if encoding is not None and encoding.num_levels > 1 and not given:
        pytest.skip("a vector position has no default")
    b = len(KEPT)
    q, k, v, positions = _padded_case(encoding, 2, math.nan, given)
    state = _states(encoding, b, 2, 8) if resumed else None
    options = {"pos_encoding": encoding, "output_final_state": True, "backend": backend}
    leaves, wanted = _leaves(encoding, q, k, v)
    o, end = causal_linear_attention(
        *leaves.values(),
        positions=positions,
        key_padding_mask=PADDING,
        initial_state=state,
        **options,
    )
    assert end.length.tolist() == [(4 if resumed else 0) + row.count("x") for row in KEPT]
    parts, wanted_alone = _leaves(encoding, q, k, v)
    alone, ends = [], []
    for i in range(b):
        kept = ~PADDING[i]
        part, last = causal_linear_attention(
            *(x[i : i + 1, kept] for x in parts.values()),
            positions=_cut(positions, slice(i, i + 1), kept),
            initial_state=state and _pick(state, i),
            **options,
        )
        alone.append(torch.zeros_like(o[i : i + 1]).index_put((torch.tensor(0), kept), part[0]))
        ends.append(last)
    assert_within(o, torch.cat(alone), 1e-12)
    assert not o[PADDING].any()
    together = [torch.cat([getattr(x, name) for x in ends]) for name in "sz"]
    for x, y in zip((end.s, end.z), together, strict=True):
        assert_within(x, y, 1e-12)
    # nor does a gradient that is NaN at padding spread
    grad_o = torch.randn_like(o)
    grads = torch.autograd.grad(
        (o, end.s),
        list(wanted.values()),
        (grad_o.masked_fill(PADDING[..., None, None], math.nan), torch.ones_like(end.s)),
        allow_unused=True,
    )
    expected = torch.autograd.grad(
        (torch.cat(alone), together[0]),
        list(wanted_alone.values()),
        (grad_o, torch.ones_like(end.s)),
        allow_unused=True,
    )
    for name, x, y in zip(wanted, grads, expected, strict=True):
        if y is not None:
            assert_within(x, y, 1e-11, name)
            if name in leaves:
                assert not x[PADDING].any()


@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe"))
def test_steps_after_padding(backend, make):
    """Sequences of different lengths decode on, each at its own position."""
    encoding = _double(make, 8, 2)
    q, k, v, _ = _padded_case(encoding, 2, math.nan, False)
    new = make_inputs(len(KEPT), 3, 2, 8, 5, seed=4)
    options = {"pos_encoding": encoding, "backend": backend}
    with torch.no_grad():
        _, state = causal_linear_attention(
            q, k, v, key_padding_mask=PADDING, output_final_state=True, **options
        )
        steps = []
        for t in range(3):
            o, state = causal_linear_attention_step(*(x[:, t] for x in new), state, **options)
            steps.append(o)
        for i, kept in enumerate(~PADDING):
            parts = zip((q, k, v), new, strict=True)
            whole = (torch.cat((x[i, kept], y[i]))[None] for x, y in parts)
            expected = causal_linear_attention(*whole, **options)[0, -3:]
            assert_within(torch.stack(steps, 1)[i], expected, 1e-11)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_shared_heads_are_repeated_heads(backend, make_encoding, heads, packed):
    encoding = _double(make_encoding, 8, 4)
    b, t = (1, sum(LENGTHS)) if packed else (2, 19)
    q, k, v = make_inputs(b, t, 4, 8, 5)
    k, v = k[:, :, :heads], v[:, :, :heads]
    positions = make_positions(encoding, b, t)
    more = {"cu_seqlens": CU} if packed else {}
    state = _states(encoding, len(LENGTHS) if packed else b, 4, 8)
    own = encoding is not None and encoding.per_head
    if not own:
        state = state._replace(s=state.s[:, :: 4 // heads], z=state.z[:, :: 4 // heads])
    options = {"pos_encoding": encoding, "positions": positions, "output_final_state": True} | more
    leaves, wanted = _leaves(encoding, q, k, v)
    o, end = causal_linear_attention(
        *leaves.values(), initial_state=state, backend=backend, **options
    )
    assert end.s.shape[1] == (4 if own else heads)
    repeated, wanted_repeated = _leaves(encoding, q, k, v)
    spread = [repeated["q"], *(repeated[n].repeat_interleave(4 // heads, 2) for n in "kv")]
    if not own:
        wide = (x.repeat_interleave(4 // heads, 1) for x in (state.s, state.z))
        state = state._replace(**dict(zip("sz", wide, strict=True)))
    expected, last = causal_linear_attention(
        *spread, initial_state=state, backend="reference", **options
    )
    s, z = (x if own else x[:, :: 4 // heads] for x in (last.s, last.z))
    assert_within(o, expected, 1e-12)
    assert_within(end.s, s, 1e-12)
    assert_within(end.z, z, 1e-12)
    grads = _gradients((o, end.s, end.z), wanted)
    for name, x in _gradients((expected, s, z), wanted_repeated).items():
        assert_within(grads[name], x, 1e-11, name)


@pytest.mark.parametrize("make", encodings("none", "rope", "rope-learned", "sinespe"))
def test_steps_with_shared_heads(backend, make):
    encoding = _double(make, 8, 4)
    q, k, v = make_inputs(2, 6, 4, 8, 5)
    k, v = k[:, :, :2], v[:, :, :2]
    options = {"pos_encoding": encoding, "backend": backend}
    with torch.no_grad():
        whole, end = causal_linear_attention(q, k, v, output_final_state=True, **options)
        o, state = causal_linear_attention(
            *(x[:, :1] for x in (q, k, v)), output_final_state=True, **options
        )
        steps = [o[:, 0]]
        for t in range(1, 6):
            o, state = causal_linear_attention_step(*(x[:, t] for x in (q, k, v)), state, **options)
            steps.append(o)
    assert_within(torch.stack(steps, 1), whole, 1e-11)
    assert_within(state.s, end.s, 1e-11)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("resumed", [False, True], ids=["start", "resumed"])
@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize(("queries", "keys"), [(4, 11), (11, 4), (1, 11), (11, 0)])
@pytest.mark.parametrize("make", encodings("none", "rope", "ropepool", "sinespe", "fstripe-vector"))
def test_unequal_lengths(backend, make, queries, keys, align, resumed, padded):
    """As if the shorter one had tokens there that nobody sees, and that see nothing."""
    encoding = _double(make, 8, 2)
    q, k, v = make_inputs(2, 11, 2, 8, 5)
    positions = make_positions(encoding, 2, 11)
    state = _states(encoding, 2, 2, 8) if resumed else None
    both = (
        slice(None, min(queries, keys))
        if align == "start"
        else slice(11 - min(queries, keys), None)
    )
    mask = torch.zeros(2, keys, dtype=torch.bool)
    if padded:
        mask[0, :2] = mask[1, -1:] = True
    short = [x[:, both] for x in (q, k, v)]
    inputs = [q if queries == 11 else short[0], *((k, v) if keys == 11 else short[1:])]
    leaves, wanted = _leaves(encoding, *inputs)
    # a query that sees one key alone has a gradient of eps only: equal numbers cancel
    options = {"pos_encoding": encoding, "positions": positions, "initial_state": state, "eps": 1.0}
    o, end = causal_linear_attention(
        *leaves.values(),
        align=align,
        key_padding_mask=mask if padded else None,
        output_final_state=True,
        backend=backend,
        **options,
    )
    # the whole thing, with keys that weigh nothing
    params = {} if encoding is None else dict(encoding.named_parameters())
    full, wanted_full = _leaves(encoding, *inputs)
    pad = (0, 0, 0, 0, 11 - min(queries, keys), 0)
    if align == "start":
        pad = (0, 0, 0, 0, 0, 11 - min(queries, keys))
    q, k, v = full.values()
    hidden = torch.zeros(2, 11, dtype=torch.bool)
    if keys == 11:
        q, hidden = torch.nn.functional.pad(q, pad) if queries < 11 else q, mask
    else:
        hidden = torch.nn.functional.pad(mask, pad[4:], value=True)
        k, v = (torch.nn.functional.pad(x, pad) for x in (k, v))
    phi, psi, pd, kd = oracle.streams(encoding, params, q, k, positions, "elu1", "direct")
    psi, kd = (x * ~hidden[..., None, None] for x in (psi, kd))
    zeros = (
        state
        or causal_linear_attention(
            *(x[:, :0] for x in (q, k, v)),
            pos_encoding=encoding,
            positions=_cut(positions, slice(None), slice(0, 0)),
            output_final_state=True,
            backend="reference",
        )[1]
    )
    num, den, s, z = oracle.direct(phi, psi, v, pd, kd, zeros.s, zeros.z)
    expected = oracle.divided(num, den, True, 1.0)
    if padded:  # outputs of padded tokens are zero
        lengths = hidden if keys == 11 else torch.nn.functional.pad(mask, pad[4:], value=False)
        expected = expected * ~lengths[..., None, None]
    if queries < 11:
        expected = expected[:, both]
    assert_within(o, expected, 1e-11)
    assert_within(end.s, s, 1e-11)
    assert_within(end.z, z, 1e-11)
    grads = _gradients((o, end.s, end.z), wanted)
    for name, x in _gradients((expected, s, z), wanted_full).items():
        assert_within(grads[name], x, 1e-10, name)


@traced
@pytest.mark.parametrize("make", encodings("none", "rope", "sinespe"))
def test_compiled_padding_and_packing(backend, make, compiled):
    """As one graph, though how many tokens are padding is not known to it."""
    if backend == "reference":
        pytest.skip("the reference looks where packed sequences end")
    encoding = _double(make, 8, 2)
    b, t = PADDING.shape
    q, k, v = make_inputs(b, t, 2, 8, 5)
    for x, more in (
        ((q, k, v), {"key_padding_mask": PADDING}),
        ((y[:1, :7] for y in (q, k, v)), {"cu_seqlens": torch.tensor([0, 3, 7])}),
    ):
        tensors = [y.contiguous() for y in x]

        def run(q, k, v, more=more):
            return causal_linear_attention(q, k, v, pos_encoding=encoding, backend=backend, **more)

        assert_within(compiled(run)(*tensors), run(*tensors), 1e-12)


def test_padding_divides_by_nothing(backend):
    """Nor its gradient, with eps = 0, where a token of padding sees no weight at all."""
    q, k, v = make_inputs(1, 6, 1, 4, 3)
    padding = torch.tensor([[True, True, False, False, False, True]])
    for options in ({"feature_map": "elu1"}, {"feature_map": "identity", "normalize": "abs"}):
        leaves, wanted = _leaves(None, q, k, v)
        o = causal_linear_attention(
            *leaves.values(), key_padding_mask=padding, eps=0, backend=backend, **options
        )
        assert all(x.isfinite().all() for x in _gradients((o,), wanted).values())


def test_positions_go_on_behind_queries_before_all_keys(backend):
    q, k, v = make_inputs(1, 6, 1, 4, 3)
    encoding = fastpe.RoPEPool(4, 1).double()
    options = {"pos_encoding": encoding, "backend": backend}
    with torch.no_grad():
        _, state = causal_linear_attention(
            q[:, :5], k[:, 3:5], v[:, 3:5], align="end", output_final_state=True, **options
        )
        assert state.length == 5
        o, _ = causal_linear_attention_step(*(x[:, 5] for x in (q, k, v)), state, **options)
        whole = causal_linear_attention(q, k[:, 3:], v[:, 3:], align="end", **options)
    assert_within(o, whole[:, 5], 1e-12)
