"""Kernels of causal linear attention: the scan in its roles.

    kernel           a    b    c      tokens      out
    forward_kernel   phi  psi  v      in order    o
    grad_q_kernel    g    v    psi    in order    dq
    grad_kv_kernel   v    g    phi    backwards   dk
                     psi  phi  g      backwards   dv (by the same tiles, its state is the transpose)

with o_t = sum_{s<=t} (a_t . b_s) c_s + a_t S, S the sum of b (x) c over the tokens before a chunk,
phi and psi the features of q and k, g = grad_o / normaliser.

A program owns a segment of one head of one sequence and a block of columns of the result; it walks
the segment chunk by chunk with the state in registers. Where heads are cut into segments, to give
the whole card work, `state_kernel` and `prefix_kernel` make the states that these begin with.
"""

import triton
import triton.language as tl

from .tiles import (
    angles,
    dot,
    feature_count,
    features,
    load_pairs,
    load_rows,
    load_state,
    load_sums,
    store_rows,
    store_state,
    store_sums,
)


@triton.jit
def place(T, SEG, NSEG, BLOCKS):
    """Return head (sequence by sequence), segment, block of columns, first token and end."""
    pid = tl.program_id(0)
    i_block = pid % BLOCKS
    i_seg = pid // BLOCKS % NSEG
    i_bh = (pid // BLOCKS // NSEG).to(tl.int64)
    begin = i_seg * SEG
    return i_bh, i_seg, i_block, begin, tl.minimum(begin + SEG, T)


@triton.jit
def divisor(den, eps, NORMALIZE: tl.constexpr):
    """Return what the weighted sum is divided by."""
    if NORMALIZE == "sum":
        return den + eps
    else:
        return tl.maximum(tl.abs(den), eps)


@triton.jit
def divisor_slope(den, eps, NORMALIZE: tl.constexpr):
    """Return the derivative of `divisor`: 0 where it is clamped."""
    if NORMALIZE == "sum":
        return tl.full(den.shape, 1.0, den.dtype)
    else:
        return tl.where(tl.abs(den) < eps, 0.0, tl.where(den < 0, -1.0, 1.0)).to(den.dtype)


@triton.jit
def products(
    x_1, x_2, y_1, y_2, acc, PARTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Return acc + x @ y, where x has its columns and y its rows in PARTS blocks."""
    acc = dot(x_1, y_1, acc, DOT, PRECISION)
    if PARTS == 2:
        acc = dot(x_2, y_2, acc, DOT, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "SEG", "NSEG"])
def forward_kernel(
    q, k, v, o, den, s0, z0, s, z, positions, freq,
    T, H, D, E, W, L, SEG, NSEG,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, position_b, freq_h, s0_size, z0_size,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, ENCODE: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
    MAP_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, STATE: tl.constexpr,
    C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, sums of weights, and the final state; a block of columns of the values."""
    NORM: tl.constexpr = NORMALIZE != "none"
    # the normaliser sees features that are not rotated
    SPLIT: tl.constexpr = MAP_FIRST and PAIRS != "none"
    NORM_PARTS: tl.constexpr = 2 if SPLIT else PARTS
    i_bh, i_seg, i_block, begin, end = place(T, SEG, NSEG, tl.cdiv(E, BE))
    i_b, i_h = i_bh // H, i_bh % H
    q += i_b * q_b + i_h * q_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    o += (i_b * T * H + i_h) * E
    den += i_bh * T
    positions += i_b * position_b
    freq += i_h * freq_h
    s0 += (i_bh * NSEG + i_seg) * s0_size
    z0 += (i_bh * NSEG + i_seg) * z0_size

    o_c, o_w, o_e = tl.arange(0, C), tl.arange(0, BW), i_block * BE + tl.arange(0, BE)
    s_1, s_2 = load_state(s0, o_w, o_e, D, W, E, PAIRS, PARTS, ACC, STATE)
    z_1, z_2 = load_sums(z0, o_w, D, W, PAIRS, NORM_PARTS, ACC, STATE and NORM)
    seen = o_c[:, None] >= o_c[None, :]
    for i in range(tl.cdiv(end - begin, C)):
        o_t = begin + i * C + o_c
        m_t = o_t < end
        cos, sin = angles(positions, freq, o_t, o_w, m_t, W, L, SCALE, PAIRS, ACC)
        q_1, q_2 = load_pairs(q, o_t, o_w, q_t, m_t, D, W, PAIRS, ACC)
        phi_1, phi_2, pd_1, pd_2 = features(
            q_1, q_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
        )
        k_1, k_2 = load_pairs(k, o_t, o_w, k_t, m_t, D, W, PAIRS, ACC)
        psi_1, psi_2, kd_1, kd_2 = features(
            k_1, k_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
        )
        b_v = load_rows(v, o_t, o_e, v_t, m_t, o_e < E, DOT)
        zero = tl.zeros((C, C), ACC)
        w = products(phi_1, phi_2, tl.trans(psi_1), tl.trans(psi_2), zero, PARTS, DOT, PRECISION)
        w = tl.where(seen, w, 0.0)
        b_o = tl.zeros((C, BE), ACC)
        b_o = products(phi_1, phi_2, s_1, s_2, b_o, PARTS, DOT, PRECISION)
        b_o = dot(w, b_v, b_o, DOT, PRECISION)
        if NORM:
            if SPLIT:
                w = products(pd_1, pd_2, tl.trans(kd_1), tl.trans(kd_2), zero, 2, DOT, PRECISION)
                w = tl.where(seen, w, 0.0)
            total = tl.sum(w, 1) + tl.sum(pd_1.to(ACC) * z_1[None, :], 1)
            z_1 += tl.sum(kd_1.to(ACC), 0)
            if NORM_PARTS == 2:
                total += tl.sum(pd_2.to(ACC) * z_2[None, :], 1)
                z_2 += tl.sum(kd_2.to(ACC), 0)
            tl.store(den + o_t, total, mask=m_t & (i_block == 0))
            b_o /= divisor(tl.where(m_t, total, 1.0), EPS, NORMALIZE)[:, None]
        store_rows(o, b_o, o_t, o_e, H * E, m_t, o_e < E)
        s_1 = dot(tl.trans(psi_1), b_v, s_1, DOT, PRECISION)
        if PARTS == 2:
            s_2 = dot(tl.trans(psi_2), b_v, s_2, DOT, PRECISION)

    if i_seg == NSEG - 1:
        R = feature_count(D, W, PAIRS, PARTS)
        store_state(s + i_bh * R * E, s_1, s_2, o_w, o_e, D, W, E, PAIRS, PARTS)
        if NORM:
            RZ = feature_count(D, W, PAIRS, NORM_PARTS)
            store_sums(z + i_bh * RZ, z_1, z_2, o_w, i_block == 0, D, W, PAIRS, NORM_PARTS)


@triton.jit(do_not_specialize=["T", "SEG", "NSEG"])
def state_kernel(
    x, y, den, delta, states, positions, freq,
    T, H, D, E, W, L, SEG, NSEG,
    x_b, x_t, x_h, y_b, y_t, y_h, position_b, freq_h,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, ENCODE: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
    MAP_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARDS: tl.constexpr,
    C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state: of psi and v, or BACKWARDS of phi and g."""
    NORM: tl.constexpr = NORMALIZE != "none"
    NORM_PARTS: tl.constexpr = 2 if MAP_FIRST and PAIRS != "none" else PARTS
    i_bh, i_seg, i_block, begin, end = place(T, SEG, NSEG, tl.cdiv(E, BE))
    # no segment begins with what the last one adds
    end = tl.where(i_seg == (0 if BACKWARDS else NSEG - 1), begin, end)
    i_b, i_h = i_bh // H, i_bh % H
    x += i_b * x_b + i_h * x_h
    y += i_b * y_b + i_h * y_h
    den += i_bh * T
    delta += i_bh * T
    positions += i_b * position_b
    freq += i_h * freq_h

    o_c, o_w, o_e = tl.arange(0, C), tl.arange(0, BW), i_block * BE + tl.arange(0, BE)
    s_1, s_2 = load_state(states, o_w, o_e, D, W, E, PAIRS, PARTS, ACC, False)
    z_1, z_2 = load_sums(states, o_w, D, W, PAIRS, NORM_PARTS, ACC, False)
    for i in range(tl.cdiv(end - begin, C)):
        o_t = begin + i * C + o_c
        m_t = o_t < end
        cos, sin = angles(positions, freq, o_t, o_w, m_t, W, L, SCALE, PAIRS, ACC)
        b_y = load_rows(y, o_t, o_e, y_t, m_t, o_e < E, ACC)
        x_1, x_2 = load_pairs(x, o_t, o_w, x_t, m_t, D, W, PAIRS, ACC)
        f_1, f_2, n_1, n_2 = features(
            x_1, x_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
        )
        if NORM:
            if BACKWARDS:
                total = tl.load(den + o_t, mask=m_t, other=1.0)
                b_y /= divisor(total, EPS, NORMALIZE)[:, None]
                b_delta = tl.load(delta + o_t, mask=m_t, other=0.0)
                n_1, n_2 = n_1.to(ACC) * b_delta[:, None], n_2.to(ACC) * b_delta[:, None]
            z_1 += tl.sum(n_1.to(ACC), 0)
            z_2 += tl.sum(n_2.to(ACC), 0)
        s_1 = dot(tl.trans(f_1), b_y, s_1, DOT, PRECISION)
        if PARTS == 2:
            s_2 = dot(tl.trans(f_2), b_y, s_2, DOT, PRECISION)
    R = feature_count(D, W, PAIRS, PARTS)
    RZ = feature_count(D, W, PAIRS, NORM_PARTS) if NORM else 0
    states += (i_bh * NSEG + i_seg) * (R * E + RZ)
    store_state(states, s_1, s_2, o_w, o_e, D, W, E, PAIRS, PARTS)
    if NORM:
        store_sums(states + R * E, z_1, z_2, o_w, i_block == 0, D, W, PAIRS, NORM_PARTS)


@triton.jit(do_not_specialize=["NSEG"])
def prefix_kernel(
    states, s0, z0, NSEG, RE, RZ,
    STATE: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Replace what the segments add by the sum of what those before add (BACKWARDS: behind)."""
    i_bh = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < RE + RZ
    total = tl.zeros((BLOCK,), ACC)
    if STATE:
        total = tl.load(s0 + i_bh * RE + o, mask=o < RE, other=0.0)
        total += tl.load(z0 + i_bh * RZ + o - RE, mask=(o >= RE) & mask, other=0.0)
    for i in range(NSEG):
        i_seg = NSEG - 1 - i if BACKWARDS else i
        at = states + (i_bh * NSEG + i_seg) * (RE + RZ) + o
        added = tl.load(at, mask=mask, other=0.0)
        # other threads may store what this one has loaded
        tl.debug_barrier()
        tl.store(at, total, mask=mask)
        total += added
