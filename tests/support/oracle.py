"""The mathematics once more, written from docs/math.md alone: slow, explicit, in any dtype.

Nothing here calls fastpe. Form "direct" in float64 is the truth: SPE's codes of each position,
every query against every key. Forms "matmul" and "recurrent" are the same maths as one would write
it for speed in plain PyTorch; their error in another dtype is the budget of `helpers.assert_close`.
Angles are made in float64 and parameters keep their dtype in all of them.
"""

import functools
import math

import torch
from torch.nn.functional import softplus

TURN = 2 * math.pi


# noise, docs/math.md, "Noise"


def philox(counter, key):
    """Philox4x32-10 on Python integers."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**32 - 1
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


@functools.cache
def normal(seed, step, module, kind, hd, rows, r):
    """Standard normal numbers [hd, rows, r] in float64; rows: how many, or a range of them."""
    rows = range(rows) if isinstance(rows, int) else rows
    key = seed & (2**32 - 1), (seed >> 32 & (2**32 - 1)) ^ (module << 3 | kind)
    out = torch.empty(hd, len(rows), -(-r // 4), 4, dtype=torch.float64)
    for i in range(hd):
        for at, j in enumerate(rows):
            for block in range(out.shape[2]):
                words = philox((block, j % 2**32, i, step), key)
                u0, u1, u2, u3 = (((x >> 9) + 0.5) * 2.0**-23 for x in words)
                a, b = math.sqrt(-2 * math.log(u0)), math.sqrt(-2 * math.log(u2))
                z = (a * math.cos(TURN * u1), a * math.sin(TURN * u1))
                z += (b * math.cos(TURN * u3), b * math.sin(TURN * u3))
                out[i, at, block] = torch.tensor(z, dtype=torch.float64)
    return out.flatten(-2)[..., :r].clone()


# encodings


def rope_features(encoding, params, x, positions):
    """docs/math.md: every pair (x1, x2) of components, one after the other."""
    heads, levels = x.shape[2], positions.shape[-1]
    width = encoding.rotary_dim // 2
    columns = list(x.unbind(-1))
    pooled = []
    for i in range(width):
        if encoding.learned:
            theta = params["theta"].double()[:, i].expand(heads, levels)
        else:
            shift = torch.arange(heads) / heads if encoding.per_head else torch.zeros(heads)
            exponent = -2 * (i + shift.double().to(x.device)) / encoding.rotary_dim
            theta = (encoding.base**exponent / levels)[:, None].expand(heads, levels)
        angle = sum(theta[:, j] * positions[..., j, None] for j in range(levels))  # [B, T, H]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = (2 * i, 2 * i + 1) if encoding.interleaved else (i, i + width)
        x1, x2 = x[..., first], x[..., second]
        pooled.append(x1 * (cos + sin) + x2 * (cos - sin))
        columns[first], columns[second] = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    if type(encoding).__name__ != "RoPEPool":
        return torch.stack(columns, -1)
    scale = 0.5**0.25 if encoding.scale == "matched" else 1.0
    return scale * torch.stack(pooled, -1)


def sine_features(encoding, params, x, positions, side, form):
    """docs/math.md, "SPE with sines" and "F-StrIPE"; section 8.1 where the form is not "direct"."""
    h, d, k = encoding.num_heads, encoding.head_dim, encoding.num_sines
    r, dtype = encoding.num_realizations, params["freqs"].dtype
    freq = torch.sigmoid(params["freqs"].double()) / 2  # [H, D, K, L]
    lam = softplus(params["gains"]) if "gains" in params else freq[..., 0].detach() * 0 + 1
    angle = TURN * (positions[:, :, None, None, None, :] * freq).sum(-1)  # [B, T, H, D, K]
    if side == "q" and "offsets" in params:
        angle = angle + params["offsets"]
    gate = torch.sigmoid(params["gate"]) if encoding.gated else None
    spe = type(encoding).__name__ in ("SineSPE", "SharedSineSPE")
    weight = lam / math.sqrt(2 * k if spe or r else k)
    if gate is not None:
        weight = (1 - gate).sqrt()[..., None] * weight
    rows = torch.stack((weight * angle.cos(), weight * angle.sin()), -1).flatten(-2)
    if gate is not None:
        rows = torch.cat((rows, gate.sqrt()[..., None].expand(*rows.shape[:-1], 1)), -1)
    if not r:
        features = rows.shape[-1] * (1 if encoding.pool else d)
        scale = (features / d) ** 0.25 if encoding.scale == "matched" else 1
        out = x[..., None] * (scale * rows).to(x.dtype)
        return out.sum(3) if encoding.pool else out.flatten(-2)
    key = encoding.noise_key.tolist()
    z = normal(*key, 0, 0, h * d, 2 * k, r).view(h, d, 2 * k, r).to(x.device)
    if gate is not None:
        eps = normal(*key, getattr(encoding, "module_id", 0), 1, h * d, 1, r)
        z = torch.cat((z, eps.view(h, d, 1, r).to(x.device)), 2)
    scale = (r * d) ** -0.25 if encoding.scale == "matched" else r**-0.5
    if form == "direct":
        code = scale * torch.einsum("bthdj,hdjr->bthdr", rows, z.to(dtype).double())
        return (x[..., None] * code.to(x.dtype)).sum(3)
    out = (x[..., None] * (scale * rows).to(x.dtype)).flatten(-2)
    return torch.einsum("bthj,hjr->bthr", out, z.flatten(1, 2).to(x.dtype))


def conv_features(encoding, params, x, positions, side):
    """docs/math.md: the code of every token, filtered from the noise around its position."""
    h, d, taps = params["weight_q"].shape
    r, dtype = encoding.num_realizations, params["weight_q"].dtype
    at = positions[..., 0].long().cpu()
    low = int(at.min()) if at.numel() else 0
    rows = range(low, int(at.max()) + taps) if at.numel() else range(taps)
    key = encoding.noise_key.tolist()
    z = normal(*key, 0, 2, h * d, rows, r).view(h, d, len(rows), r).to(x.device, dtype)
    code = z.unfold(2, taps, 1)[:, :, at.flatten() - low]
    code = torch.einsum("hdj,hdnrj->nhdr", params[f"weight_{side}"], code)
    if encoding.gated:
        gate = torch.sigmoid(params["gate"])[..., None]
        eps = normal(*key, getattr(encoding, "module_id", 0), 1, h * d, 1, r).view(h, d, r)
        code = (1 - gate).sqrt() * code + gate.sqrt() * eps.to(x.device, dtype)
    code = (r * d) ** -0.25 * code.view(*at.shape, h, d, r)
    return (x[..., None] * code.to(x.dtype)).sum(3)


def encode(encoding, params, x, positions, side, form="direct"):
    """Return the features of x before any feature map; positions [B or 1, T, L] in float64."""
    if encoding is None:
        return x
    if hasattr(encoding, "rotary_dim"):
        return rope_features(encoding, params, x, positions)
    if hasattr(encoding, "num_sines"):
        return sine_features(encoding, params, x, positions, side, form)
    if hasattr(encoding, "kernel_size"):
        return conv_features(encoding, params, x, positions, side)
    return encoding.oracle(params, x, positions, side)


# attention


def content(name, x):
    """docs/math.md, "Feature maps"."""
    if name == "elu1":
        # clamp has slope 1 at 0 as elu has, where minimum would share it between its arguments
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    if name == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x)) + 1e-3
    return torch.exp(x) if name == "exp" else x


def streams(encoding, params, q, k, positions, feature_map, form):
    """Return phi, psi of the numerator and of the denominator (docs/math.md)."""
    if getattr(encoding, "apply_order", None) == "after":
        pd, kd = content(feature_map, q), content(feature_map, k)
        phi = encode(encoding, params, pd, positions, "q")
        return phi, encode(encoding, params, kd, positions, "k"), pd, kd
    phi = content(feature_map, encode(encoding, params, q, positions, "q", form))
    psi = content(feature_map, encode(encoding, params, k, positions, "k", form))
    return phi, psi, phi, psi


def direct(phi, psi, v, pd, kd, s0, z0):
    """Sum over every query and every key up to its own."""
    num, den = [], []
    for m in range(phi.shape[1]):
        seen = slice(0, m + 1)
        w = (phi[:, m : m + 1] * psi[:, seen]).sum(-1, keepdim=True)  # [B, n, H, 1]
        num.append((w * v[:, seen]).sum(1) + (phi[:, m, :, :, None] * s0).sum(2))
        den.append((pd[:, m : m + 1] * kd[:, seen]).sum((1, 3)) + (pd[:, m] * z0).sum(-1))
    s = s0 + (psi[..., :, None] * v[..., None, :]).sum(1)
    return torch.stack(num, 1), torch.stack(den, 1), s, z0 + kd.sum(1)


def matmul(phi, psi, v, pd, kd, s0, z0):
    """The same by matrix products."""
    past = phi.new_ones(phi.shape[1], phi.shape[1]).tril()
    w = torch.einsum("bthr,bshr->bhts", phi, psi) * past
    num = torch.einsum("bhts,bshe->bthe", w, v) + torch.einsum("bthr,bhre->bthe", phi, s0)
    den = torch.einsum("bthr,bshr,ts->bth", pd, kd, past) + torch.einsum("bthr,bhr->bth", pd, z0)
    return num, den, s0 + torch.einsum("bthr,bthe->bhre", psi, v), z0 + kd.sum(1)


def recurrent(phi, psi, v, pd, kd, s, z):
    """The same through the state, token by token."""
    num, den = [], []
    for m in range(phi.shape[1]):
        s = s + psi[:, m, :, :, None] * v[:, m, :, None, :]
        z = z + kd[:, m]
        num.append(torch.einsum("bhr,bhre->bhe", phi[:, m], s))
        den.append(torch.einsum("bhr,bhr->bh", pd[:, m], z))
    return torch.stack(num, 1), torch.stack(den, 1), s, z


SCANS = {"direct": direct, "matmul": matmul, "recurrent": recurrent}


def divided(num, den, normalize, eps):
    """The denominator policies of docs/math.md, "Causal linear attention"."""
    if not normalize:
        return num
    if normalize == "abs":
        den = torch.where(den.abs() > eps, den.abs(), torch.full_like(den, eps))
    else:
        den = den + eps
    return num / den[..., None]


def attention(
    q,
    k,
    v,
    encoding=None,
    positions=None,
    params=None,
    *,
    s0=None,
    z0=None,
    start=0,
    feature_map="elu1",
    normalize=True,
    eps=1e-6,
    form="direct",
):
    """Causal linear attention: o, s and z (without columns if nothing is normalised)."""
    if positions is None:
        positions = torch.arange(start, start + q.shape[1], dtype=torch.float64, device=q.device)
        positions = positions[None, :, None]
    phi, psi, pd, kd = streams(encoding, params or {}, q, k, positions, feature_map, form)
    if not normalize:
        pd, kd = pd[..., :0], kd[..., :0]
    if s0 is None:
        s0 = q.new_zeros(*psi[:, 0].shape, v.shape[-1])
        z0 = q.new_zeros(kd[:, 0].shape)
    num, den, s, z = SCANS[form](phi, psi, v, pd, kd, s0, z0)
    return divided(num, den, normalize, eps), s, z


# FAVOR+, docs/math.md, "Feature maps"


def favor_exponents(omega, x):
    """+-w . y and |y|^2 / 2 of y = x F^(-1/4), for columns w in omega [H, F, M]."""
    y = x * x.shape[-1] ** -0.25
    dots = torch.stack([y[..., h, :] @ omega[h] for h in range(x.shape[-2])], -2)
    return torch.cat((dots, -dots), -1), y.square().sum(-1, keepdim=True) / 2


def log_attention(a, b, v):
    """Attention in log space: a softmax over every key up to the query's own."""
    logits = (a.transpose(1, 2)[:, :, :, None] + b.transpose(1, 2)[:, :, None]).logsumexp(-1)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)
