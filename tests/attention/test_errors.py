"""Bad input: an error of the right type that names the argument, before any kernel runs."""

import pytest
import torch
from conftest import encodings
from helpers import make_inputs

from fastpe import (
    FStripe,
    RoPE,
    RoPEPool,
    SineSPE,
    causal_linear_attention,
    causal_linear_attention_step,
)
from fastpe.nn import CausalLinearAttention

# B, T, H, D, E = 2, 5, 3, 8, 6
Q, K, V = make_inputs(2, 5, 3, 8, 6, torch.float32)
INF, NAN = float("inf"), float("nan")


def _attend(backend="reference", **changes):
    given = {"q": Q, "k": K, "v": V, "backend": backend} | changes
    return causal_linear_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


MASK, CU = torch.zeros(2, 5, dtype=torch.bool), torch.tensor([0, 2, 5])
PACKED = {"q": Q[:1], "k": K[:1], "v": V[:1], "cu_seqlens": CU}


def _with(values):
    positions = torch.arange(5.0)
    positions[2] = values
    return positions


BAD = [
    # tensors
    ({"q": [1, 2]}, TypeError, "q must be a tensor, got list"),
    ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    ({"v": 3.0}, TypeError, "v must be a tensor, got float"),
    ({"q": Q[0]}, ValueError, r"q must be \[B, T, H, D\], got shape \(5, 3, 8\)"),
    ({"v": V[..., None]}, ValueError, r"v must be \[B, T, Hk, E\]"),
    ({"k": K[:1]}, ValueError, r"k must be .* with B = 2 and D = 8 of q, got \(1, 5, 3, 8\)"),
    ({"k": K[:, :, :2]}, ValueError, "k must have a number of heads that divides q's 3, got 2"),
    (
        {"k": K[:, :, :0], "v": V[:, :, :0]},
        ValueError,
        "k must have a number of heads that divides q's 3",
    ),
    ({"k": K[:, :, :1]}, ValueError, r"v must be .* with B, T, Hk of k = \(2, 5, 1\)"),
    ({"k": K[..., :7]}, ValueError, "k must be .* D = 8"),
    ({"v": V[:, :4]}, ValueError, r"v must be \[B, T, Hk, E\] with B, T, Hk of k = \(2, 5, 3\)"),
    ({"v": V[:1]}, ValueError, "v must be"),
    ({"v": V[:, :, :2]}, ValueError, "v must be"),
    ({"v": V[..., :0]}, ValueError, "E = 0"),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "D = 0"),
    ({"q": Q.int()}, TypeError, "q must be float32, float64, bfloat16 or float16, got torch.int32"),
    ({"q": Q.to(torch.complex64)}, TypeError, "q must be float32"),
    ({"q": Q.bool()}, TypeError, "q must be float32"),
    ({"k": K.double()}, TypeError, "k must have the dtype of q, torch.float32, got torch.float64"),
    ({"v": V.half()}, TypeError, "v must have the dtype of q"),
    (
        dict.fromkeys("qkv", torch.nested.nested_tensor([Q[0, :2], Q[1]], layout=torch.jagged)),
        TypeError,
        r"q must be a dense tensor, got a nested one: .* values\(\) .* offsets\(\) as cu_seqlens",
    ),
    ({"k": K.to("meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
    ({"v": V.to("meta")}, ValueError, "v must be on the device of q"),
    # sequences
    ({"q": Q[:, :4]}, ValueError, "align must be 'end' or 'start' with 5 keys for 4 queries"),
    ({"align": "top"}, ValueError, "align must be 'end' or 'start', got 'top'"),
    ({"key_padding_mask": MASK, **PACKED}, ValueError, "must not be given both"),
    ({"key_padding_mask": MASK.float()}, TypeError, "key_padding_mask must be a bool tensor"),
    ({"key_padding_mask": [False]}, TypeError, "key_padding_mask must be a bool tensor, .* list"),
    (
        {"key_padding_mask": MASK[:, :4]},
        ValueError,
        r"key_padding_mask must be \[B, T\] = \(2, 5\)",
    ),
    ({"key_padding_mask": MASK.to("meta")}, ValueError, "key_padding_mask must be on the device"),
    (
        {"cu_seqlens": CU},
        ValueError,
        "cu_seqlens needs sequences packed in one row, B = 1, got B = 2",
    ),
    (PACKED | {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
    (PACKED | {"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be an int32 or int64"),
    (PACKED | {"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens must be \[S \+ 1\]"),
    (PACKED | {"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must be \[S \+ 1\]"),
    (
        PACKED | {"cu_seqlens": CU + 1},
        ValueError,
        "must begin with 0, .* end with T = 5, got 1 at the beginning",
    ),
    (
        PACKED | {"cu_seqlens": CU[:-1]},
        ValueError,
        "cu_seqlens must begin with 0, .* got 2 at the end",
    ),
    (
        PACKED | {"cu_seqlens": torch.tensor([0, 1, 4, 3, 5])},
        ValueError,
        "cu_seqlens must begin .* got 3 after 4 at index 3",
    ),
    (PACKED | {"q": Q[:1, :4], "align": "end"}, ValueError, "as many tokens as q with cu_seqlens"),
    # options
    ({"feature_map": "elu"}, ValueError, "feature_map must be one of 'elu1', 'relu', 'exp'"),
    ({"feature_map": None}, ValueError, "feature_map must be one of"),
    ({"feature_map": torch.relu}, ValueError, "feature_map must be one of"),
    ({"normalize": "sum"}, ValueError, "normalize must be True, False or 'abs', got 'sum'"),
    ({"normalize": None}, ValueError, "normalize must be"),
    ({"normalize": 1}, ValueError, "normalize must be"),
    ({"feature_map": "identity"}, ValueError, "normalize must be 'abs' or False with feature_map"),
    ({"eps": -1e-6}, ValueError, "eps must be a finite number >= 0, got -1e-06"),
    ({"eps": NAN}, ValueError, "eps must be"),
    ({"eps": INF}, ValueError, "eps must be"),
    ({"eps": "1"}, ValueError, "eps must be"),
    ({"eps": None}, ValueError, "eps must be"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive int, got 0"),
    ({"chunk_size": -64}, ValueError, "chunk_size must be"),
    ({"chunk_size": True}, ValueError, "chunk_size must be a positive int, got True"),
    ({"chunk_size": 16.0}, ValueError, "chunk_size must be"),
    (
        {"backend": "metal"},
        ValueError,
        "backend must be one of 'auto', 'cpu', 'triton', 'cuda', 'reference'",
    ),
    ({"backend": None}, ValueError, "backend must be one of"),
    # encodings
    ({"pos_encoding": "rope"}, TypeError, "pos_encoding must be a fastpe.PositionalEncoding"),
    ({"pos_encoding": torch.nn.Linear(8, 8)}, TypeError, "pos_encoding must be"),
    ({"pos_encoding": RoPE}, TypeError, "pos_encoding must be"),
    ({"pos_encoding": RoPE(6)}, ValueError, "q must have D = 6 of pos_encoding"),
    ({"pos_encoding": SineSPE(8, 2)}, ValueError, "q must have H = 2 of pos_encoding"),
    ({"pos_encoding": SineSPE(8, 3).to("meta")}, ValueError, "q must be on pos_encoding's meta"),
    # positions
    ({"positions": torch.arange(5)}, ValueError, "positions must be None without pos_encoding"),
]
ROPE, VECTOR = RoPE(8), FStripe(8, 3, num_levels=3)
BAD_POSITIONS = [
    (ROPE, [0, 1, 2, 3, 4], TypeError, "positions must be a tensor, got list"),
    (ROPE, 3, TypeError, "positions must be a tensor"),
    (ROPE, torch.arange(4), ValueError, r"positions must be \[5\], \[2, 5\], .* got \(4,\)"),
    (ROPE, torch.tensor(1.0), ValueError, "positions must be"),
    (ROPE, torch.zeros(3, 5), ValueError, "positions must be"),
    (ROPE, torch.zeros(5, 2), ValueError, "positions must be"),
    (ROPE, torch.zeros(2, 5, 2), ValueError, "positions must be"),
    (ROPE, torch.zeros(2, 5, 1, 1), ValueError, "positions must be"),
    (ROPE, torch.zeros(5, dtype=torch.complex64), TypeError, "positions must be integers, bools"),
    *(
        (
            ROPE,
            torch.arange(5).to(dtype),
            TypeError,
            f"got {dtype}, which rounds .* cast_forward_inputs=False",
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2)
    ),
    (ROPE, _with(NAN), ValueError, "positions must be finite, at most 2\\^53 in size"),
    (ROPE, _with(INF), ValueError, "positions must be finite"),
    (ROPE, _with(-INF).double(), ValueError, "positions must be finite"),
    (ROPE, _with(1e30), ValueError, "positions must be finite, at most 2\\^53 in size"),
    (ROPE, torch.full((5,), 2**60), ValueError, "positions must be finite, at most 2\\^53 in size"),
    (ROPE, torch.zeros(5, device="meta"), ValueError, "positions must be on the device of q"),
    (VECTOR, None, ValueError, "positions must be given for a pos_encoding of 3 levels"),
    (VECTOR, torch.zeros(5), ValueError, r"positions must be \[5, 3\] or \[2, 5, 3\]"),
    (VECTOR, torch.zeros(2, 5), ValueError, "positions must be"),
    (VECTOR, torch.zeros(2, 5, 2), ValueError, "positions must be"),
    (VECTOR, torch.zeros(2, 3, 5), ValueError, "positions must be"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        _attend(**changes)


@pytest.mark.parametrize(("encoding", "positions", "error", "message"), BAD_POSITIONS)
def test_bad_positions(encoding, positions, error, message):
    with pytest.raises(error, match=message):
        _attend(pos_encoding=encoding, positions=positions)


def test_backend_for_another_device(kernels):
    q, k, v = (x.to("meta") for x in (Q, K, V))
    with pytest.raises(ValueError, match="backend 'cpu' needs tensors on the CPU, got meta"):
        _attend(kernels, q=q, k=k, v=v)
    # the reference runs anywhere
    assert _attend("reference", q=q, k=k, v=v).shape == V.shape


# states


def _state(encoding=None, q=Q, k=K, v=V, **options):
    return causal_linear_attention(
        *(q, k, v), pos_encoding=encoding, output_final_state=True, backend="reference", **options
    )[1]


def _one(x, size):
    return x[..., :1].expand(*x.shape[:-1], size)


OTHER_STATES = {
    "another batch": (None, _state(q=Q[:1], k=K[:1], v=V[:1]), {}),
    "other heads": (None, _state(q=Q[:, :, :1], k=K[:, :, :1], v=V[:, :, :1]), {}),
    "another head dim": (None, _state(q=_one(Q, 4), k=_one(K, 4)), {}),
    "another value dim": (None, _state(v=_one(V, 7)), {}),
    "another encoding": (RoPE(8), _state(), {}),
    "no encoding": (None, _state(RoPE(8)), {}),
    "another base": (RoPE(8), _state(RoPE(8, base=500.0)), {}),
    "another layout": (RoPE(8), _state(RoPE(8, interleaved=False)), {}),
    "another order": (RoPE(8), _state(RoPE(8, apply="before")), {}),
    "more sines": (SineSPE(8, 3, seed=1), _state(SineSPE(8, 3, num_sines=5, seed=1)), {}),
    "no gate": (SineSPE(8, 3, seed=1), _state(SineSPE(8, 3, gated=False, seed=1)), {}),
    "another seed": (SineSPE(8, 3, seed=1), _state(SineSPE(8, 3, seed=2)), {}),
    "another feature map": (None, _state(feature_map="relu"), {}),
    "no normaliser": (None, _state(normalize=False), {}),
    "another normaliser": (None, _state(), {"normalize": "abs"}),
    "another dtype": (None, _state(q=Q.double(), k=K.double(), v=V.double()), {}),
    "another device": (None, _state()._replace(s=torch.zeros(2, 3, 8, 6, device="meta")), {}),
    "half precision": (None, _state()._replace(z=_state().z.half()), {}),
    "a narrower z": (None, _state()._replace(z=_state().z[..., :3]), {}),
    "no z": (None, _state()._replace(z=_state().z[..., :0]), {}),
    "s without a head": (None, _state()._replace(s=_state().s[:, :2]), {}),
}


@pytest.mark.parametrize("name", list(OTHER_STATES))
def test_states_of_other_configurations(name):
    encoding, state, options = OTHER_STATES[name]
    with pytest.raises(ValueError, match="initial_state"):
        _attend(pos_encoding=encoding, initial_state=state, **options)
    with pytest.raises(ValueError, match="initial_state"):
        causal_linear_attention_step(
            Q[:, 0], K[:, 0], V[:, 0], state, pos_encoding=encoding, backend="reference", **options
        )


def test_state_of_another_noise_step():
    encoding = SineSPE(8, 3, seed=1)
    state = _state(encoding)
    encoding.resample_()
    with pytest.raises(ValueError, match=r"made with another \(seed, step\) of noise"):
        _attend(pos_encoding=encoding, initial_state=state)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ((1, 2), TypeError),
        (torch.zeros(2, 3, 8, 6), TypeError),
        (_state(SineSPE(8, 3, seed=1))._replace(noise=None), ValueError),
    ],
    ids=["tuple", "tensor", "no noise"],
)
def test_not_a_state(state, error):
    with pytest.raises(error, match="initial_state"):
        _attend(pos_encoding=SineSPE(8, 3, seed=1), initial_state=state)


def test_state_of_another_share():
    """Shares have the same noise but for the gate's."""
    source = SineSPE(8, 3, seed=1)
    one, other = source.share(), source.share()
    state = _state(one)
    _attend(pos_encoding=one, initial_state=state)
    with pytest.raises(ValueError, match="module_id=2"):
        _attend(pos_encoding=other, initial_state=state)


# one step


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": Q}, ValueError, r"q must be one token, \[B, H, D\], got shape \(2, 5, 3, 8\)"),
        ({"k": K[0, 0]}, ValueError, "k must be one token"),
        ({"v": 1}, (ValueError, TypeError), "v must be"),
        ({"positions": torch.zeros(2, 1)}, ValueError, r"positions must be a number or \[2\]"),
        ({"positions": torch.zeros(3)}, ValueError, "positions must be"),
        ({"positions": "x"}, (ValueError, TypeError), "positions"),
        ({"positions": NAN}, ValueError, "positions must be finite"),
        ({"positions": 10**400}, ValueError, "positions must be finite"),
        ({"positions": True}, TypeError, "positions must be a tensor or number, got bool"),
        ({"pos_encoding": "x", "positions": 1.0}, TypeError, "pos_encoding must be"),
        ({"state": None}, TypeError, "state must be a LinearAttentionState"),
        ({"feature_map": "softmax"}, ValueError, "feature_map must be"),
        ({"eps": -1}, ValueError, "eps must be"),
        ({"backend": "metal"}, ValueError, "backend must be"),
    ],
)
def test_bad_steps(changes, error, message):
    given = {"q": Q[:, 0], "k": K[:, 0], "v": V[:, 0], "state": _state(ROPE)} | changes
    tensors = [given.pop(name) for name in ("q", "k", "v", "state")]
    options = {"pos_encoding": ROPE, "backend": "reference"} | given
    with pytest.raises(error, match=message):
        causal_linear_attention_step(*tensors, **options)


# constructors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(7), "head_dim must be even to form pairs, got 7"),
        (lambda: RoPEPool(7, 2), "head_dim must be even"),
        (lambda: RoPE(0), "head_dim must be a positive int, got 0"),
        (lambda: RoPE(8.0), "head_dim must be a positive int"),
        (lambda: RoPE(8, num_levels=0), "num_levels must be a positive int"),
        (lambda: RoPE(8, 0), "num_heads must be a positive int"),
        (lambda: RoPE(8, rotary_dim=3), "rotary_dim must be even"),
        (lambda: RoPE(8, rotary_dim=10), r"rotary_dim must be even and in 2\.\.8, got 10"),
        (lambda: RoPE(8, rotary_dim=0), "rotary_dim must be"),
        (lambda: RoPE(8, per_head=True), "num_heads must be given with"),
        (lambda: RoPEPool(8), r"num_heads must be given .* set per_head=False"),
        (lambda: RoPE(8, apply="both"), "apply must be 'after' or 'before', got 'both'"),
        (lambda: RoPE(8, base=0), "base must be a positive number"),
        (lambda: RoPE(8, base=NAN), "base must be a positive number"),
        (lambda: RoPEPool(8, 2, scale="none"), "scale must be 'matched' or 'paper'"),
        (lambda: SineSPE(8, None), "num_heads must be a positive int"),
        (lambda: SineSPE(8, 2, num_sines=0), "num_sines must be a positive int, got 0"),
        (lambda: SineSPE(8, 2, num_realizations=0), "num_realizations must be a positive int"),
        (lambda: SineSPE(8, 2, resample="always"), "resample must be 'forward', 'never' or"),
        (lambda: SineSPE(8, 2, resample=0), "resample must be"),
        (lambda: SineSPE(8, 2, resample=-1), "resample must be"),
        (lambda: FStripe(8, 2, scale="none"), "scale must be"),
        (lambda: RoPE(8, num_levels=2), "learned must be True with num_levels = 2"),
        (lambda: FStripe(8, 2, pool=False, num_realizations=4), "num_realizations"),
        (lambda: FStripe(8, 2, gated=True), "gated must be False for pooled features"),
        (lambda: FStripe(8, 2, num_levels=-1), "num_levels must be"),
        (lambda: FStripe(8, 2, frequency=0.5), "frequency must be between 0 and 1/2, .* got 0.5"),
        (lambda: FStripe(8, 2, frequency=["a"]), r"frequency must be .* got \['a'\]"),
        (
            lambda: FStripe(8, 2, num_levels=3, frequency=[0.1, 0.2]),
            r"one for each of num_levels = 3, got \[0.1, 0.2\]",
        ),
        (lambda: CausalLinearAttention(10, 3), "embed_dim must be divisible by num_heads = 3"),
        (lambda: CausalLinearAttention(12, 3, value_dim=10), "value_dim must be divisible"),
        (lambda: CausalLinearAttention(12, 0), "num_heads must be a positive int, got 0"),
        (lambda: CausalLinearAttention(12, 3.0), "num_heads must be a positive int, got 3.0"),
        (lambda: CausalLinearAttention(12, 3, feature_map="gelu"), "feature_map must be one of"),
        (lambda: CausalLinearAttention(12, 3, normalize="max"), "normalize must be"),
        (lambda: CausalLinearAttention(12, 3, eps=-1), "eps must be"),
        (lambda: CausalLinearAttention(12, 3, backend="x"), "backend must be one of"),
        (lambda: RoPE(True), "head_dim must be a positive int, got True"),
        (lambda: RoPE(8, rotary_dim=2.0), "rotary_dim must be a positive int, got 2.0"),
        (lambda: RoPE(8, base="a"), "base must be a positive number, got 'a'"),
        (lambda: SineSPE(8, 2, seed=1.5), "seed must be an int of 64 bits, got 1.5"),
        (lambda: SineSPE(8, 2, seed=2**64), "seed must be an int of 64 bits"),
        (lambda: SineSPE(8, 2, resample=True), "resample must be"),
        (lambda: SineSPE(8, 2, gated="no"), "gated must be True or False, got 'no'"),
        (lambda: FStripe(8, 2, pool="mean"), "pool must be True or False, got 'mean'"),
        (lambda: CausalLinearAttention(12, 3, pos_encoding=RoPE(8)), "head_dim = 4"),
        (lambda: CausalLinearAttention(12, 3, pos_encoding=SineSPE(4, 2)), "num_heads = 3"),
    ],
)
def test_bad_constructions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nested_tensors_as_the_error_says():
    """The remedy that the message names gives each sequence what it has alone."""
    parts = [torch.randn(t, 3, 8) for t in (2, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    row = nested.values()[None]
    o = causal_linear_attention(row, row, row, cu_seqlens=nested.offsets(), backend="reference")
    for part, found in zip(parts, o[0].split((2, 5)), strict=True):
        alone = causal_linear_attention(*(part[None],) * 3, backend="reference")
        assert torch.equal(found, alone[0])


def test_bad_layer_inputs():
    layer = CausalLinearAttention(12, 3, pos_encoding=RoPE(4), backend="reference")
    for x in (torch.zeros(2, 12), torch.zeros(2, 5, 11), torch.zeros(1, 2, 5, 12)):
        with pytest.raises(ValueError, match=r"x must be \[B, T, embed_dim\] with embed_dim = 12"):
            layer(x)
    _, state = layer(torch.zeros(2, 5, 12), output_final_state=True)
    with pytest.raises(ValueError, match=r"x must be \[B, embed_dim\]"):
        layer.step(torch.zeros(2, 1, 12), state)
    with pytest.raises(ValueError, match="positions must be"):
        layer(torch.zeros(2, 5, 12), positions=torch.zeros(4))
    nested = torch.nested.nested_tensor([torch.zeros(3, 12)], layout=torch.jagged)
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        layer(nested)
    for x in ([1], None, torch.zeros(2, 5, 12, dtype=torch.int64)):
        with pytest.raises(TypeError, match="x must be a tensor of floats"):
            layer(x)
    with pytest.raises(TypeError, match=r"x must have the dtype of the layer, torch.float32"):
        layer(torch.zeros(2, 5, 12, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"pos_encoding must be a fastpe\.PositionalEncoding"):
        CausalLinearAttention(12, 3, pos_encoding="rope")


# not errors


@pytest.mark.parametrize("make", encodings("rope", "sinespe", "convspe"))
def test_positions_of_every_dtype(backend, make):
    """Bools count as 0 and 1, as they do everywhere in PyTorch."""
    encoding, bools = make(8, 3), torch.tensor([True, False, True, True, False])
    integers = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
    wanted = _attend(backend, pos_encoding=encoding, positions=bools.double())
    for dtype in (torch.bool, *integers, torch.float32):
        found = _attend(backend, pos_encoding=encoding, positions=bools.to(dtype))
        assert torch.equal(found, wanted), dtype
    with pytest.raises(TypeError, match="which rounds positions"):
        encoding.kernel(torch.arange(5).bfloat16())


@pytest.mark.parametrize("make", encodings("-rope-vector", "-fstripe-vector"))
def test_shortest_sequences(backend, make):
    """T = 1, T = 0 and B = 0, with a state and without."""
    encoding = make(8, 3)
    for b, t in ((2, 1), (2, 0), (0, 5)):
        x = [x[:b, :t] for x in (Q, K, V)]
        o, state = causal_linear_attention(
            *x, pos_encoding=encoding, output_final_state=True, backend=backend
        )
        assert o.shape == (b, t, 3, 6)
        assert state.length == t
        assert state.s.shape[0] == b
        if t == 1:
            rotated = isinstance(encoding, RoPE) and encoding.apply_order == "after"
            tolerance = INF if rotated else 1e-5
            assert (o - x[2]).abs().max() < tolerance
        if t == 0:
            assert state.s.abs().max() == 0
        again, after = causal_linear_attention(
            *x,
            pos_encoding=encoding,
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        assert again.shape == o.shape
        assert after.length == 2 * t
