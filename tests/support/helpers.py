"""Inputs, runs of fastpe and of the oracle with every gradient, and comparison by error budget."""

import functools
import math

import oracle
import pytest
import torch
from torch import nn

import fastpe
from fastpe import backends

# views of other memory with the numbers of x
LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "packed": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every other": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "gaps": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0, 0, 2))[:, : x.shape[1], 1:, 3:-2],
    "reversed twice": lambda x: x.flip(1).flip(1),
}
# Dynamo itself makes an instance of the class when it traces a Function
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def tolerance(name, dtype):
    """Return what docs/math.md (T1, T4, T7) asks, relative, in float64 and float32."""
    if dtype == torch.float64:
        return 1e-11
    if dtype == torch.float32:
        return 1e-3 if name == "dfreqs" else 1e-4 if name[0] == "d" else 1e-5
    return 0.0  # half precision has the budget alone


class Fade(fastpe.PositionalEncoding):
    """A level-0 encoding: only `features`, in plain PyTorch; products fade with the lag."""

    def __init__(self, head_dim, num_heads):
        super().__init__(head_dim, num_heads)
        self.rate = nn.Parameter(torch.linspace(0.01, 0.02, num_heads))

    @property
    def feature_dim(self):
        return self.head_dim

    def features(self, x, positions, side):
        sign = -1 if side == "q" else 1
        return x * torch.exp(sign * self.rate.double() * positions)[..., None].to(x.dtype)

    def kernel(self, positions_q, positions_k=None):
        lag = self._levels(positions_q) - self._levels(positions_k)
        c = torch.exp(-self.rate.detach().double() * lag)
        return c[..., None, None] * torch.eye(self.head_dim, dtype=torch.float64)

    def oracle(self, params, x, positions, side):
        """See `oracle.encode`."""
        growth = torch.exp(params["rate"] * positions).to(x.dtype)[..., None]
        return x / growth if side == "q" else x * growth


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_inputs(b, t, h, d, e, dtype=torch.float64, seed=0, device="cpu"):
    """Return q, k [B, T, H, D] and v [B, T, H, E], standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, t, h, d), (b, t, h, d), (b, t, h, e)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple(x.to(device, dtype) for x in made)


def make_positions(encoding, b, t, seed=0, device="cpu"):
    """Return structure positions [B, T, L]: repeated, unordered, of both signs, real if allowed."""
    if encoding is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-20, 60, (b, t, encoding.num_levels), generator=generator)
    labels = labels.to(device).double() / 2
    return labels.round() if encoding.integer_positions else labels


def make_state(encoding, b, h, d, e, dtype, device="cpu", **options):
    """Return a state with random contents, s of both signs and z positive."""
    q, k, v = make_inputs(b, 1, h, d, e, dtype, seed=5, device=device)
    positions = make_positions(encoding, b, 1, device=device)
    with torch.no_grad():
        state = fastpe.causal_linear_attention(
            *(q, k, v),
            pos_encoding=encoding,
            positions=positions,
            output_final_state=True,
            backend="reference",
            **options,
        )[1]
    generator = torch.Generator().manual_seed(6)
    s, z = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for x in (state.s, state.z)
    )
    return state._replace(s=s, z=z.abs())


def gradients(outputs, leaves, seed=7):
    """Return the gradients of a random linear form of the outputs, by name ("dq", ...)."""
    loss = 0
    for i, x in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(seed + i)
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        # a gradient that half precision can hold, so that every dtype is given the same
        loss = loss + (x.double() * weight.to(torch.bfloat16).double()).sum()
    used = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(used.items(), found, strict=True)
    }


def results(outputs, leaves):
    """Return the outputs and the gradients."""
    return outputs | gradients(outputs, leaves)


def leaf(x, dtype=None):
    return None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()


class Problem:
    """One call: inputs, an encoding and options; run by fastpe and by the oracle.

    Results are dicts of o, s, z and the gradients of every input, state and parameter. `forms` are
    those of the oracle whose error is allowed: over hundreds of tokens a recurrence in half
    precision would allow anything; `exact` is the one that is run in float64.
    """

    def __init__(
        self,
        encoding=None,
        dtype=torch.float64,
        *,
        shape=(2, 37, 2),
        d=8,
        e=6,
        positions="structure",
        state=True,
        device="cpu",
        forms=("matmul", "recurrent"),
        exact="direct",
        **options,
    ):
        (b, t, h), d = shape, d if encoding is None else encoding.head_dim
        if encoding is not None:
            encoding.to(device, torch.float64 if dtype == torch.float64 else None)
        self.encoding, self.dtype, self.options = encoding, dtype, options
        self.forms, self.exact = forms, exact
        self.q, self.k, self.v = make_inputs(b, t, h, d, e, dtype, device=device)
        self.positions = positions
        if positions == "structure":
            self.positions = make_positions(encoding, b, t, device=device)
        self.state = make_state(encoding, b, h, d, e, dtype, device, **options) if state else None
        self._expected = {}

    @property
    def levels(self):
        return 1 if self.encoding is None else self.encoding.num_levels

    def params(self, dtype=None):
        if self.encoding is None:
            return {}
        named = dict(self.encoding.named_parameters())
        return named if dtype is None else {name: leaf(p, dtype) for name, p in named.items()}

    def run(
        self,
        backend,
        *,
        layout=lambda x: x,
        function=fastpe.causal_linear_attention,
        derive=results,
        **options,
    ):
        """Return the results of fastpe; `layout` makes a view of each of q, k and v."""
        self._skip_unless_supported(backend)
        leaves = {"q": leaf(self.q), "k": leaf(self.k), "v": leaf(self.v)}
        state = self.state
        if state is not None:
            leaves |= {"s0": leaf(state.s), "z0": leaf(state.z)}
            state = state._replace(s=leaves["s0"], z=leaves["z0"])
        if self.positions is not None:
            leaves["positions"] = leaf(self.positions)
        o, final = function(
            *(layout(leaves[name]) for name in "qkv"),
            pos_encoding=self.encoding,
            positions=leaves.get("positions"),
            initial_state=state,
            output_final_state=True,
            backend=backend,
            **(self.options | options),
        )
        outputs, leaves = {"o": o, "s": final.s, "z": final.z}, leaves | self.params()
        return derive(outputs, leaves)

    def _skip_unless_supported(self, backend):
        if backend == "reference":
            return
        d = self.q.shape[-1]
        r = d if self.encoding is None else self.encoding.feature_dim
        sizes = self.q.device, self.dtype, (d, r, self.v.shape[-1])
        reason = backends.load(backend).unsupported(*sizes)
        if reason is not None:
            pytest.skip(f"backend {backend!r} {reason}")

    def expected(self, *how, **more):
        """Return the results of the oracle, computed once."""
        key = *how, *more.items()
        if key not in self._expected:
            self._expected[key] = self.compute(*how, **more)
        return self._expected[key]

    def compute(self, dtype=torch.float64, form=None, *, rounding=None, derive=results):
        """Return the results of the oracle, in a dtype, from numbers that are rounded."""
        leaves = {name: leaf(getattr(self, name), dtype) for name in "qkv"}
        if self.state is not None:
            leaves |= {"s0": leaf(self.state.s, dtype), "z0": leaf(self.state.z, dtype)}
        if self.positions is not None:
            leaves["positions"] = leaf(self.positions, torch.float64)
        params = self.params(compute_dtype(dtype))
        if rounding is not None:
            round_(leaves | params, *rounding)
        o, s, z = oracle.attention(
            *(leaves[name] for name in "qkv"),
            self.encoding,
            leaves.get("positions"),
            params,
            s0=leaves.get("s0"),
            z0=leaves.get("z0"),
            start=0 if self.state is None else self.state.length,
            form=form or self.exact,
            **self.options,
        )
        outputs, leaves = {"o": o, "s": s, "z": z}, leaves | params
        return derive(outputs, leaves)

    def plain(self, dtype):
        """Return what plain PyTorch gives at a dtype, in two orders of summation; and roundings.

        A rounding is exact arithmetic on inputs off by their last digit: three of them, since the
        error of a single number may be small by chance.
        """
        forms = [self.expected(dtype, form) for form in self.forms]
        return forms + [self.expected(rounding=(dtype, seed)) for seed in range(3)]

    def check(self, actual):
        """Compare results with the oracle's, in the error budget of the dtype."""
        plain = [] if self.dtype == torch.float64 else self.plain(self.dtype)
        assert_close(actual, self.expected(), plain, self.dtype)


@functools.cache
def problem(make_encoding, dtype=torch.float64, *, shape=(2, 37, 2), d=8, **options):
    """Return the problem of an encoding's factory; the oracle runs once for all backends."""
    return Problem(make_encoding(d, shape[2]), dtype, shape=shape, d=d, **options)


def round_(leaves, dtype, seed):
    """Change each number by one unit in the last place of a dtype, up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in leaves.items():
            # positions are exact; states and parameters are in float32 for half precision
            unit = torch.finfo(dtype if name in "qkv" else compute_dtype(dtype)).eps
            signs = (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x.device)
            x.mul_(1 + unit * signs * (name != "positions"))


def error(actual, exact):
    """Return the largest difference, in float64; NaN counts as infinite."""
    if not exact.numel():
        return 0.0
    gap = (actual.detach().double() - exact.detach().double()).abs().max().item()
    return gap if gap == gap else math.inf


def rms(x):
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(actual, exact, plain=(), dtype=torch.float64):
    """Check each tensor of a dict against the exact one.

    float64: within the tolerance of docs/math.md. Otherwise within twice the error of the same
    maths in plain PyTorch at that dtype (the worst of `plain`, each a dict), and one rounding: in
    root mean square; in the largest error too, where docs/math.md does not allow more.
    """
    eps, failures = torch.finfo(dtype).eps, []
    for name, x in actual.items():
        wanted = exact[name].detach()
        assert x.shape == wanted.shape, (name, x.shape, wanted.shape)
        assert not x.isnan().any(), name
        size = wanted.abs().max().item() if x.numel() else 0.0
        measures = [(error, size, tolerance(name, dtype) * size)]
        # of a few numbers the root mean square is one draw of the error, not its size
        if dtype != torch.float64 and x.numel() >= 64:
            measures.append((lambda x, y: rms(x.double() - y.double()), rms(wanted), 0.0))
        for measure, norm, allowed in measures:
            if plain:
                budget = 2 * max(measure(p[name], wanted) for p in plain) + eps * norm
                allowed = max(allowed, budget)
            off = measure(x, wanted)
            if not off <= allowed:
                failures.append(f"{name}: off by {off:.3g}, allowed {allowed:.3g}, norm {norm:.3g}")
    assert not failures, "; ".join(failures)


def assert_within(actual, exact, tolerance, name="o"):
    """Check one tensor against another, in max norm relative to it."""
    assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
    off = error(actual, exact)
    size = exact.detach().abs().max().item() if exact.numel() else 0.0
    assert off <= tolerance * size, f"{name}: off by {off:.3g} of {size:.3g}, {tolerance:.1g} asked"
