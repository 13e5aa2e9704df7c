"""Kernels of the sine features (SineSPE, F-StrIPE) and of their gradient.

For sine k, each component of a tile of tokens is multiplied by gain * cos and gain * sin of its
phase. Rows 2k and 2k + 1 of the noise project these to R features with one product each, so codes
never exist. Without noise, "pool" sums the rows over components, as if noise were ones, and "keep"
makes each row a feature.

A tile holds BN tokens of BB sequences, which share sines because they share positions.
"""

import triton
import triton.language as tl

from .elementwise import nearest, sincos_turns, turns
from .tiles import dot


@triton.jit
def place(B, T, H, BB: tl.constexpr, BN: tl.constexpr):
    """Return head, first sequence, tokens [BN]; sequence, token and mask of each row."""
    tiles = tl.cdiv(T, BN)
    i_n = tl.program_id(0) % tiles
    i_b = tl.program_id(0) // tiles * BB
    o_n = i_n * BN + tl.arange(0, BN)
    o_m = tl.arange(0, BB * BN)
    o_b, o_t = i_b + o_m // BN, i_n * BN + o_m % BN
    i_h = tl.program_id(1).to(tl.int64)
    return i_h, i_b, o_n, o_b.to(tl.int64), o_t.to(tl.int64), (o_b < B) & (o_t < T)


@triton.jit
def to_rows(x, BB: tl.constexpr):
    """Repeat the tile of one sequence for BB sequences."""
    if BB == 1:
        return x
    else:
        N: tl.constexpr = x.shape[0]
        D: tl.constexpr = x.shape[1]
        return tl.reshape(tl.broadcast_to(x[None], (BB, N, D)), (BB * N, D))


@triton.jit
def sines(
    positions, freq, offset, gain, o_n, m_n, o_d, m_d, i_k, K, L,
    OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return cos and sin of the phases of sine i_k, [BN, BD], and its gains, [BD]."""
    u = tl.zeros((o_n.shape[0], o_d.shape[0]), ACC)
    at = o_d * K + i_k
    for i in range(L):
        position = tl.load(positions + o_n.to(tl.int64) * L + i, mask=m_n, other=0.0)
        f = tl.load(freq + at * L + i, mask=m_d, other=0.0)
        u += turns(position[:, None], f[None, :], ACC)
    if OFFSET:
        shift = tl.load(offset + at, mask=m_d, other=0.0)
        u += (shift - nearest(shift)).to(ACC)[None, :]
    s, c = sincos_turns(u)
    return c, s, tl.load(gain + at, mask=m_d, other=0.0).to(ACC)


@triton.jit
def mixing(noise, o_d, m_d, o_r, R, J, j, MIX: tl.constexpr):
    """Return row j of the components' noise, [BD, BR]."""
    if MIX == "pool":
        row = tl.where(o_r == j, 1.0, 0.0)[None, :]
        return tl.broadcast_to(row, (o_d.shape[0], o_r.shape[0]))
    else:
        at = (o_d[:, None] * J + j) * R + o_r[None, :]
        return tl.load(noise + at, mask=m_d[:, None] & (o_r < R)[None, :], other=0.0)


@triton.jit(do_not_specialize=["B", "T", "position_b"])
def features_kernel(
    x, y, positions, freq, offset, gain, gate, noise,
    B, T, H, D, K, J, R, L, G, x_b, x_t, x_h, position_b,
    MIX: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a block of features of a tile of tokens."""
    i_h, i_b, o_n, o_b, o_t, m_m = place(B, T, H, BB, BN)
    m_n = o_n < T
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    x += i_h // G * x_h
    y += i_h * R
    positions += i_b.to(tl.int64) * position_b
    freq += i_h * D * K * L
    offset += i_h * D * K
    gain += i_h * D * K
    gate += i_h * D
    noise += i_h * D * J * R
    row_x, row_y = o_b * x_b + o_t * x_t, (o_b * T + o_t) * H * R
    total = tl.zeros((BB * BN, BR), ACC)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        m_x = m_m[:, None] & m_d[None, :]
        b_x = tl.load(x + row_x[:, None] + o_d[None, :], mask=m_x, other=0.0).to(ACC)
        for i_k in range(K):
            c, s, b_gain = sines(
                positions, freq, offset, gain, o_n, m_n, o_d, m_d, i_k, K, L, OFFSET, ACC
            )
            scaled = b_x * b_gain[None, :]
            u_c, u_s = scaled * to_rows(c, BB), scaled * to_rows(s, BB)
            if MIX == "keep":
                at = row_y[:, None] + (o_d * J + 2 * i_k)[None, :]
                tl.store(y + at, u_c.to(y.dtype.element_ty), mask=m_x)
                tl.store(y + at + 1, u_s.to(y.dtype.element_ty), mask=m_x)
            else:
                z_c = mixing(noise, o_d, m_d, o_r, R, J, 2 * i_k, MIX)
                z_s = mixing(noise, o_d, m_d, o_r, R, J, 2 * i_k + 1, MIX)
                total = dot(u_c, z_c, total, DOT, PRECISION)
                total = dot(u_s, z_s, total, DOT, PRECISION)
        if GATE:
            u = b_x * tl.load(gate + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
            if MIX == "keep":
                at = row_y[:, None] + (o_d * J + J - 1)[None, :]
                tl.store(y + at, u.to(y.dtype.element_ty), mask=m_x)
            else:
                z = mixing(noise, o_d, m_d, o_r, R, J, J - 1, MIX)
                total = dot(u, z, total, DOT, PRECISION)
    if MIX != "keep":
        m_y = m_m[:, None] & (o_r < R)[None, :]
        tl.store(y + row_y[:, None] + o_r[None, :], total.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def pulled(
    dy, row_y, m_m, noise, o_d, m_d, R, J, j, MIX: tl.constexpr, BR: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the components' row j, [M, BD]."""
    if MIX == "keep":
        at = row_y[:, None] + (o_d * J + j)[None, :]
        return tl.load(dy + at, mask=m_m[:, None] & m_d[None, :], other=0.0).to(ACC)
    elif MIX == "pool":
        column = tl.load(dy + row_y + j, mask=m_m, other=0.0).to(ACC)
        return tl.broadcast_to(column[:, None], (row_y.shape[0], o_d.shape[0]))
    else:
        g = tl.zeros((row_y.shape[0], o_d.shape[0]), ACC)
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_y = m_m[:, None] & (o_r < R)[None, :]
            b_dy = tl.load(dy + row_y[:, None] + o_r[None, :], mask=m_y, other=0.0)
            z = mixing(noise, o_d, m_d, o_r, R, J, j, MIX)
            g = dot(b_dy, tl.trans(z), g, DOT, PRECISION)
        return g


@triton.jit(do_not_specialize=["B", "T", "position_b"])
def features_backward_kernel(
    x, dy, dx, dpositions, partial, dgate, positions, freq, offset, gain, gate, noise,
    B, T, H, D, K, J, R, L, G, x_b, x_t, x_h, dy_b, dy_t, dy_h, position_b,
    MIX: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr,
    WANT_X: tl.constexpr, WANT_POSITIONS: tl.constexpr, WANT_PARAMETERS: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store gradients of x and positions, and a tile's part of the gradients of parameters.

    partial [tiles, H, K, 2 + L, D] holds the gradient by the gain, by the phase in radians, and the
    latter times each position, without the factor gain.
    """
    PARAMETER_PRECISION: tl.constexpr = "ieee" if ACC == tl.float64 else "tf32x3"
    i_h, i_b, o_n, o_b, o_t, m_m = place(B, T, H, BB, BN)
    m_n = o_n < T
    x += i_h // G * x_h
    dy += i_h * dy_h
    dx += i_h * D
    positions += i_b.to(tl.int64) * position_b
    freq += i_h * D * K * L
    offset += i_h * D * K
    gain += i_h * D * K
    gate += i_h * D
    noise += i_h * D * J * R
    partial += (tl.program_id(0).to(tl.int64) * H + i_h) * K * (2 + L) * D
    dgate += (tl.program_id(0).to(tl.int64) * H + i_h) * D
    row_x, row_y, row_dx = o_b * x_b + o_t * x_t, o_b * dy_b + o_t * dy_t, (o_b * T + o_t) * H * D
    o_l = tl.arange(0, BL)
    by_position = tl.zeros((BB * BN, BL), ACC)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        m_x = m_m[:, None] & m_d[None, :]
        b_x = tl.load(x + row_x[:, None] + o_d[None, :], mask=m_x, other=0.0).to(ACC)
        b_dx = tl.zeros((BB * BN, BD), ACC)
        for i_k in range(K):
            c, s, b_gain = sines(
                positions, freq, offset, gain, o_n, m_n, o_d, m_d, i_k, K, L, OFFSET, ACC
            )
            c, s = to_rows(c, BB), to_rows(s, BB)
            g_c = pulled(
                dy, row_y, m_m, noise, o_d, m_d, R, J, 2 * i_k, MIX, BR, ACC, DOT, PRECISION
            )
            g_s = pulled(
                dy, row_y, m_m, noise, o_d, m_d, R, J, 2 * i_k + 1, MIX, BR, ACC, DOT, PRECISION
            )
            along = g_c * c + g_s * s
            if WANT_X:
                b_dx += b_gain[None, :] * along
            if WANT_PARAMETERS or WANT_POSITIONS:
                across = b_x * (g_s * c - g_c * s)
            if WANT_PARAMETERS:
                at = partial + i_k * (2 + L) * D + o_d
                tl.store(at, tl.sum(b_x * along, 0), mask=m_d)
                tl.store(at + D, tl.sum(across, 0), mask=m_d)
                for i in range(L):
                    p = tl.load(positions + o_t * L + i, mask=m_m, other=0.0).to(ACC)
                    tl.store(at + (2 + i) * D, tl.sum(across * p[:, None], 0), mask=m_d)
            if WANT_POSITIONS:
                at = (o_d[:, None] * K + i_k) * L + o_l[None, :]
                f = tl.load(freq + at, mask=m_d[:, None] & (o_l < L)[None, :], other=0.0).to(ACC)
                f *= b_gain[:, None]
                by_position = dot(across, f, by_position, ACC, PARAMETER_PRECISION)
        if GATE:
            e = pulled(dy, row_y, m_m, noise, o_d, m_d, R, J, J - 1, MIX, BR, ACC, DOT, PRECISION)
            b_dx += tl.load(gate + o_d, mask=m_d, other=0.0).to(ACC)[None, :] * e
            if WANT_PARAMETERS:
                tl.store(dgate + o_d, tl.sum(b_x * e, 0), mask=m_d)
        if WANT_X:
            tl.store(dx + row_dx[:, None] + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m_x)
    if WANT_POSITIONS:
        at = ((o_b * H + i_h) * T + o_t)[:, None] * L + o_l[None, :]
        tl.store(dpositions + at, by_position, mask=m_m[:, None] & (o_l < L)[None, :])
