"""Direct O(T^2) definitions of the systems in fastpe_lab/baselines, token by token and key by key.

Each takes a module (for its parameters and sizes), q, k, v [B, T, H, D] and positions [B, T, L].
"""

import math

import torch


def dot(x, y):
    return (x * y).sum(-1)


def over(pairs):
    """Softmax attention of one token: pairs of a logit [B, H] and a value [B, H, E]."""
    logits = torch.stack([logit.expand(pairs[-1][1].shape[:2]) for logit, _ in pairs])
    values = torch.stack([value.expand_as(pairs[-1][1]) for _, value in pairs])
    return (logits.softmax(0)[..., None] * values).sum(0)


def tokens(q, pairs_of):
    return torch.stack([over(pairs_of(i)) for i in range(q.shape[1])], 1)


def sines(n, dim, base=10000.0):
    """Sinusoids of numbers n [...], [..., dim]."""
    n = n.double()
    columns = [
        (torch.sin if c % 2 == 0 else torch.cos)(n * base ** (-(c - c % 2) / dim))
        for c in range(dim)
    ]
    return torch.stack(columns, -1)


def softmax(m, q, k, v, positions):
    root = math.sqrt(q.shape[-1])
    return tokens(q, lambda i: [(dot(q[:, i], k[:, j]) / root, v[:, j]) for j in range(i + 1)])


def shaw(m, q, k, v, positions):
    root = math.sqrt(q.shape[-1])

    def pairs(i):
        for j in range(i + 1):
            c = min(i - j, m.max_distance)
            yield dot(q[:, i], k[:, j] + m.keys[c]) / root, v[:, j] + m.values[c]

    return tokens(q, lambda i: list(pairs(i)))


def music_transformer(m, q, k, v, positions):
    root, far = math.sqrt(q.shape[-1]), m.distances.shape[1] - 1

    def pairs(i):
        for j in range(i + 1):
            yield dot(q[:, i], k[:, j] + m.distances[:, min(i - j, far)]) / root, v[:, j]

    return tokens(q, lambda i: list(pairs(i)))


def music_transformer_local(m, q, k, v, positions):
    root = math.sqrt(q.shape[-1])

    def pairs(i):
        for j in range(max(i // m.block - 1, 0) * m.block, i + 1):
            yield dot(q[:, i], k[:, j] + m.distances[:, i - j]) / root, v[:, j]

    return tokens(q, lambda i: list(pairs(i)))


def xl_logit(m, query, key, distance):
    """Of `RelativeLogits` m."""
    r = sines(torch.tensor(distance), len(m.weight))
    r = torch.einsum("c,chd->hd", r, m.weight)
    logit = dot(query, key) + dot(query, r) + dot(m.u, key) + dot(m.v, r)
    return logit / math.sqrt(query.shape[-1])


def transformer_xl(m, q, k, v, positions):
    def pairs(i):
        own = i // m.segment
        for j in range(max(own - 1, 0) * m.segment, i + 1):
            here = j // m.segment == own
            key, value = (x[:, j] if here else x[:, j].detach() for x in (k, v))
            yield xl_logit(m.logits, q[:, i], key, i - j), value

    return tokens(q, lambda i: list(pairs(i)))


def compressed(m, x, which, first, filters=None):
    """One slot, made of the tokens first ... first + rate - 1."""
    part = x[:, first : first + m.rate]
    if m.kind == "mean":
        return part.sum(1) / m.rate
    if m.kind == "max":
        return part.max(1).values
    filters = m.filters if filters is None else filters
    return sum(
        torch.einsum("bhd,hde->bhe", part[:, r], filters[which][:, r]) for r in range(m.rate)
    )


def compressive(m, q, k, v, positions):
    old_k, old_v = k.detach(), v.detach()
    fixed = None if m.filters is None else m.filters.detach()

    def pairs(i):
        segment = i // m.memory
        start = max(segment - 1, 0) * m.memory  # of the memory
        made = range(0, start, m.rate)
        for slot in made[-m.compressed :]:
            key, value = (compressed(m, x, w, slot, fixed) for w, x in enumerate((old_k, old_v)))
            yield xl_logit(m.logits, q[:, i], key, i - start + (start - slot) // m.rate), value
        for j in range(start, i + 1):
            here = j // m.memory == segment
            key, value = (k[:, j], v[:, j]) if here else (old_k[:, j], old_v[:, j])
            yield xl_logit(m.logits, q[:, i], key, i - j), value

    return tokens(q, lambda i: list(pairs(i)))


def reconstruction(m, q, k, v):
    """The auxiliary loss of the Compressive Transformer."""
    q, k, v = (x.detach() for x in (q, k, v))
    root, squares = math.sqrt(q.shape[-1]), []
    for i in range(m.memory, q.shape[1]):
        first = (i // m.memory - 1) * m.memory
        span = range(first, first + m.memory)
        full = over([(dot(q[:, i], k[:, j]) / root, v[:, j]) for j in span])
        slots = [
            [compressed(m, x, w, j, m.filters) for w, x in enumerate((k, v))]
            for j in span[:: m.rate]
        ]
        coarse = over([(dot(q[:, i], key) / root, value) for key, value in slots])
        squares.append((full - coarse) ** 2)
    return torch.stack(squares).mean() if squares else torch.zeros(())


def stripe(m, q, k, v, positions):
    root, heads = math.sqrt(q.shape[-1]), q.shape[2]

    def encoded(level, difference):  # [B] to [B, E]
        if m.table is None:
            return sines(difference, q.shape[-1], m.base)
        far = m.max_difference
        return m.table[level][[min(max(int(d), -far), far) + far for d in difference]]

    def pairs(i):
        for j in range(i + 1):
            logit = dot(q[:, i], k[:, j])
            for level in range(len(m.weight)):
                e = encoded(level, positions[:, i, level] - positions[:, j, level])
                turned = torch.stack([e @ m.weight[level, h].T for h in range(heads)], 1)
                logit = logit + dot(q[:, i], turned)
            yield logit / root, v[:, j]

    return tokens(q, lambda i: list(pairs(i)))


def performer(m, q, k, v, positions):
    width = q.shape[-1]
    omega = m.favor.omega(q.shape[2], width, torch.float64)

    def phi(x):
        x = x * width**-0.25
        w = torch.einsum("bthd,hdm->bthm", x, omega)
        return (torch.cat((w, -w), -1) - (x * x).sum(-1, keepdim=True) / 2).exp()

    a, b = phi(q), phi(k)

    def token(i):
        weights = torch.stack([dot(a[:, i], b[:, j]) for j in range(i + 1)])
        values = torch.stack([v[:, j] for j in range(i + 1)])
        return (weights[..., None] * values).sum(0) / weights.sum(0)[..., None]

    return torch.stack([token(i) for i in range(q.shape[1])], 1)


def buckets(m, x):
    """Of one token of one head, x [D], in every round: argmax [x R; -x R]."""

    def make(head):
        for rotation in m.rotations[:, head].tolist():
            turned = [
                sum(float(x[d]) * rotation[d][n] for d in range(len(x)))
                for n in range(len(rotation[0]))
            ]
            both = turned + [-t for t in turned]
            yield both.index(max(both))

    return make


def reformer(m, q, k, v, positions):
    batch, length, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            x, y = q[b, :, h], v[b, :, h]
            found = [list(buckets(m, x[t].detach())(h)) for t in range(length)]
            for i in range(length):
                seen = set()
                for r in range(len(m.rotations)):
                    same = [j for j in range(i) if found[j][r] == found[i][r]]
                    seen |= set(same[-m.chunk :])
                keys = sorted(seen) or [i]
                logits = torch.stack([dot(x[i], x[j] / dot(x[j], x[j]).sqrt()) for j in keys])
                rows.append(logits.softmax(0) @ y[keys])
    return torch.stack(rows).view(batch, heads, length, -1).transpose(1, 2)


def synthesizer(m, q, k, v, positions):
    def logits(i):  # [B, H, max_len]
        hidden = torch.einsum("bhd,hed->bhe", q[:, i], m.first) + m.first_bias
        return torch.einsum("bhe,hse->bhs", hidden.clamp(min=0), m.second) + m.second_bias

    def pairs(i):
        row = logits(i)
        return [(row[..., j], v[:, j]) for j in range(i + 1)]

    return tokens(q, pairs)


def synthesizer_random(m, q, k, v, positions):
    def pairs(i):
        return [(dot(m.rows[:, i], m.columns[:, j])[None], v[:, j]) for j in range(i + 1)]

    return tokens(q, pairs)


def linformer(m, q, k, v, positions):
    root, length = math.sqrt(q.shape[-1]), q.shape[1]

    def mixed(weight, x, r):
        return sum(weight[r, t] * x[:, t] for t in range(length))

    slots = [(mixed(m.keys, k, r), mixed(m.values, v, r)) for r in range(len(m.keys))]
    return tokens(q, lambda i: [(dot(q[:, i], key) / root, value) for key, value in slots])


def fnet(m, q, k, v, positions):
    x = v.flatten(2).to(torch.complex128)
    transforms = []
    for n in x.shape[1:]:
        turn = torch.arange(n, dtype=torch.float64)
        angle = -2 * math.pi * torch.outer(turn, turn) / n
        transforms.append(torch.complex(angle.cos(), angle.sin()))
    return torch.einsum("st,btc,cd->bsd", transforms[0], x, transforms[1]).real.view(v.shape)


DIRECT = {
    "softmax": softmax,
    "shaw": shaw,
    "music-transformer": music_transformer,
    "music-transformer-local": music_transformer_local,
    "transformer-xl": transformer_xl,
    "compressive-mean": compressive,
    "compressive-max": compressive,
    "compressive-conv": compressive,
    "stripe-srpe": stripe,
    "stripe-ssrpe": stripe,
    "performer": performer,
    "reformer": reformer,
    "synthesizer": synthesizer,
    "synthesizer-random": synthesizer_random,
    "linformer": linformer,
    "fnet": fnet,
}
