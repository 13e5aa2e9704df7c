"""Calls with every argument, as hypothesis draws them, and the same by formulas in any dtype."""

import itertools

import oracle
import torch
from conftest import ENCODINGS
from helpers import compute_dtype, leaf, make_inputs, make_positions, make_state, results, round_
from hypothesis import strategies as st

import fastpe

BY_NAME = {p.id: p.values[0] for p in ENCODINGS}
WIDE = "taylor2", "dpfp", "favor"


def _features(feature_map, encoding, params, x, at, side):
    """Return features for the numerator and for the normaliser (docs/math.md)."""
    if getattr(encoding, "apply_order", None) == "after":
        x = oracle.content(feature_map, x)
        return oracle.encode(encoding, params, x, at, side), x
    y = oracle.encode(encoding, params, x, at, side)
    if feature_map == "taylor2":
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2) / (2 * y.shape[-1]) ** 0.5
        y = torch.cat((torch.ones_like(y[..., :1]), y * y.shape[-1] ** -0.25, pairs), -1)
    elif feature_map == "dpfp":
        parts = torch.cat((y, -y), -1)
        parts = torch.where(parts > 0, parts, torch.zeros_like(parts))
        y = parts * parts.roll(-1, -1)
    elif not isinstance(feature_map, fastpe.Favor):
        y = oracle.content(feature_map, y)
    return y, y


def _favor(psi, q, k, v, seen):
    """A softmax in log space; a query that sees no key gives 0."""

    def exponents(x):
        y = x * x.shape[-1] ** -0.25
        dots = torch.einsum("...hf,hfm->...hm", y, psi.omega(*x.shape[-2:], x.dtype))
        return torch.cat((dots, -dots), -1), y.square().sum(-1, keepdim=True) / 2

    (a, _), (b, half) = exponents(q), exponents(k)
    logits = (a[0, :, None] + (b - half)[0, None]).logsumexp(-1).movedim(-1, 0)
    blind = ~seen.any(-1)
    weights = logits.masked_fill(~(seen | blind[:, None]), -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights.masked_fill(blind[:, None], 0), v[0])


class Call:
    """One call: sequences are tokens of rows, at places of a time line that q and k share.

    sequences: (row, places of queries, places of keys) of each.
    """

    def __init__(self, encoding, dtype, sizes, d, e, sequences, given, resumed, **options):
        (self.b, self.tq, self.tk), self.heads, self.key_heads = sizes
        self.encoding, self.dtype, self.options = encoding, dtype, options
        self.sequences, self.longest = sequences, max(self.tq, self.tk)
        if encoding is not None:
            encoding.to(torch.float64 if dtype == torch.float64 else torch.float32)
        q, k, v = make_inputs(self.b, self.longest, self.heads, d, e, dtype)
        self.q = q[:, : self.tq]
        self.k, self.v = (x[:, : self.tk, : self.key_heads] for x in (k, v))
        self.given = make_positions(encoding, self.b, self.longest) if given else None
        self.favor = isinstance(options["feature_map"], fastpe.Favor)
        self.state = None
        if resumed:
            chosen = {name: options[name] for name in ("feature_map", "normalize")}
            state = make_state(encoding, len(sequences), self.heads, d, e, dtype, **chosen)
            if not self.own:
                state = state._replace(
                    s=state.s[:, : self.key_heads].clone(), z=state.z[:, : self.key_heads].clone()
                )
            self.state = state

    @property
    def own(self):
        """Whether each head of queries has a state of its own."""
        return self.favor or (self.encoding is not None and self.encoding.per_head)

    def shift(self, side):
        """Return where the first query or key stands on the time line."""
        mine = self.tq if side == "q" else self.tk
        return self.longest - mine if self.options.get("align") == "end" else 0

    def positions(self):
        """Return [B, T, L]: those given, or each sequence's count of tokens."""
        if self.given is not None or self.encoding is None:
            return self.given
        at = torch.zeros(self.b, self.longest, 1, dtype=torch.float64)
        start = 0 if self.state is None else self.state.length
        for row, queries, keys in self.sequences:
            for i, place in enumerate(sorted({*queries, *keys})):
                at[row, place] = start + i
        return at

    def leaves(self, dtype=None):
        leaves = {name: leaf(getattr(self, name), dtype) for name in "qkv"}
        if self.state is not None:
            leaves |= {"s0": leaf(self.state.s, dtype), "z0": leaf(self.state.z, dtype)}
        if self.encoding is not None:
            named = self.encoding.named_parameters()
            leaves |= {n: p if dtype is None else leaf(p, compute_dtype(dtype)) for n, p in named}
        return leaves

    def derive(self, outputs, leaves):
        """Return outputs and the gradients that are no difference of equal numbers.

        Of Favor, whose eps is 0, that of v alone; of parameters none where no query sees another
        token: a relative encoding is then the identity.
        """
        if self.favor:
            return results({"o": outputs["o"]}, {"v": leaves["v"]})
        others = any(
            keys[0] < queries[-1] for _, queries, keys in self.sequences if queries and keys
        )
        if self.state is None and not others:
            leaves = {name: leaves[name] for name in "qkv"}
        return results(outputs, leaves)

    def run(self, backend, **options):
        leaves, state = self.leaves(), self.state
        if state is not None:
            state = state._replace(s=leaves["s0"], z=leaves["z0"])
        o, end = fastpe.causal_linear_attention(
            *(leaves[name] for name in "qkv"),
            pos_encoding=self.encoding,
            positions=self.given,
            initial_state=state,
            output_final_state=True,
            backend=backend,
            **(self.options | options),
        )
        outputs = (
            {"o": o}
            if self.options["feature_map"] in WIDE
            else dict(zip("osz", (o, *end[:2]), strict=True))
        )
        return self.derive(outputs, leaves)

    def compute(self, dtype=torch.float64, rounding=None):
        """Return the same by every query's sum over the keys that it sees."""
        leaves = self.leaves(dtype)
        if rounding is not None:
            round_(leaves, *rounding)
        group, at = self.heads // self.key_heads, self.positions()
        o, s, z = leaves["v"].new_zeros(self.b, self.tq, self.heads, self.v.shape[-1]), [], []
        o = o + 0 * leaves["v"].sum()  # of no sequence too there is a gradient
        for i, (row, queries, keys) in enumerate(self.sequences):
            queries, keys = (torch.tensor(x, dtype=torch.long) for x in (queries, keys))
            rows_q, rows_k = queries - self.shift("q"), keys - self.shift("k")
            q = leaves["q"][row : row + 1, rows_q]
            k, v = (leaves[n][row : row + 1, rows_k].repeat_interleave(group, 2) for n in "kv")
            there = [None if at is None else at[row : row + 1, x] for x in (queries, keys)]
            out, *end = self._sequence(leaves, i, (q, k, v), there, keys <= queries[:, None])
            o = o.index_put((torch.tensor(row), rows_q), out)
            for total, x in zip((s, z), end):  # noqa: B905, Favor's are left out
                total.append(x)
        outputs = {"o": o}
        if s and self.options["feature_map"] not in WIDE and not self.favor:
            outputs |= {"s": torch.stack(s), "z": torch.stack(z)}
        return self.derive(outputs, leaves)

    def _sequence(self, leaves, i, tensors, positions, seen):
        """Return o [T, H, E] and the final s and z of one sequence."""
        (q, k, v), psi = tensors, self.options["feature_map"]
        sides = zip((q, k), positions, "qk", strict=True)
        if self.favor:
            q, k = (oracle.encode(self.encoding, leaves, x, at, side) for x, at, side in sides)
            return (_favor(psi, q, k, v, seen),)
        (phi, pd), (psi, kd) = (_features(psi, self.encoding, leaves, *side) for side in sides)
        if not self.options["normalize"]:
            pd, kd = pd[..., :0], kd[..., :0]
        weights, sums = (
            torch.einsum("thr,shr->hts", x[0], y[0]).masked_fill(~seen, 0)
            for x, y in ((phi, psi), (pd, kd))
        )
        num, den = torch.einsum("hts,she->the", weights, v[0]), sums.sum(-1).mT
        # what a head of keys has seen, by each of the heads of queries that share it
        s, z = torch.einsum("shr,she->hre", psi[0], v[0]), kd[0].sum(0)
        wide = 1 if self.own else self.heads // self.key_heads
        if self.state is not None:
            s0, z0 = (leaves[n][i].repeat_interleave(wide, 0) for n in ("s0", "z0"))
            num = num + torch.einsum("thr,hre->the", phi[0], s0)
            den, s, z = den + torch.einsum("thr,hr->th", pd[0], z0), s + s0, z + z0
        o = oracle.divided(num, den, self.options["normalize"], self.options["eps"])
        return o, s[::wide], z[::wide]


@st.composite
def encodings_for(draw, feature_map):
    """An encoding that a feature map takes, its name, the head dim, heads of q and of k."""
    name = draw(st.sampled_from(sorted(BY_NAME)))
    key_heads = draw(st.integers(1, 2))
    heads, d = key_heads * draw(st.integers(1, 3)), draw(st.integers(1, 12))
    d += "rope" in name and d % 2
    encoding = BY_NAME[name](d, heads)
    if feature_map in WIDE and getattr(encoding, "apply_order", None) == "after":
        encoding.apply_order = "before"
    return encoding, d, heads, key_heads


@st.composite
def layouts(draw):
    """Numbers of rows, queries and keys; the sequences, and the arguments that tell them."""
    kind = draw(st.sampled_from(["packed", "padded", "aligned"]))
    if kind == "packed":
        lengths = draw(st.lists(st.integers(0, 9), max_size=5))
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        tokens = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        sizes, more = (1, bounds[-1], bounds[-1]), {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}
        return sizes, [(0, x, x) for x in tokens], more
    b, tq = draw(st.integers(0, 3)), draw(st.integers(0, 12))
    tk, align = tq, draw(st.sampled_from(["start", "end"]))
    if kind == "aligned":
        tk = draw(st.integers(0, 12))
    mask = torch.zeros(b, tk, dtype=torch.bool)
    padded = kind == "padded" or draw(st.booleans())
    if padded:
        row = st.lists(st.booleans(), min_size=tk, max_size=tk)
        mask = torch.tensor([draw(row) for _ in range(b)], dtype=torch.bool).view(b, tk)
    longest = max(tq, tk)
    first_q, first_k = (longest - t if align == "end" else 0 for t in (tq, tk))
    sequences = []
    for i in range(b):
        hidden = {first_k + j for j in range(tk) if mask[i, j]}
        places = ([first + j for j in range(t)] for first, t in ((first_q, tq), (first_k, tk)))
        sequences.append((i, *([x for x in side if x not in hidden] for side in places)))
    more = {"key_padding_mask": mask} if padded else {}
    return (b, tq, tk), sequences, more | ({"align": align} if tq != tk else {})


@st.composite
def calls(draw):
    feature_map = draw(st.sampled_from(["elu1", "relu", "exp", "identity", *WIDE]))
    encoding, d, heads, key_heads = draw(encodings_for(feature_map))
    (b, tq, tk), sequences, more = draw(layouts())
    favor, wide = feature_map == "favor", feature_map in WIDE
    signed = feature_map == "identity" or getattr(encoding, "apply_order", None) == "after"
    # "abs" adds no eps: a weight that is alone has no gradient, so only after a state
    choices = [False] if signed else [True, False] if wide else [True, False, "abs"]
    normalize = favor or draw(st.sampled_from(choices))
    resumed = not wide and (normalize == "abs" or draw(st.booleans()))
    given = encoding is not None and (encoding.num_levels > 1 or draw(st.booleans()))
    return Call(
        encoding,
        draw(st.sampled_from([torch.float64, torch.float32])),
        ((b, tq, tk), heads, key_heads),
        d,
        draw(st.integers(1, 9)),
        sequences,
        given,
        resumed,
        feature_map=fastpe.Favor(6, seed=3) if favor else feature_map,
        normalize=normalize,
        # the gradient of a weight that is alone is eps over itself: a difference of equal numbers
        eps=1.0,
        **more,
    )
