"""Kernels of the gradient of causal linear attention; causal_dot.py has the table."""

import triton
import triton.language as tl

from .causal_dot import divisor, divisor_slope, place, products
from .tiles import (
    angles,
    dot,
    feature_count,
    features,
    features_adjoint,
    load_pairs,
    load_rows,
    load_state,
    load_sums,
    store_pairs,
    store_rows,
    store_state,
    store_sums,
)


@triton.jit
def token_weights(do, o, den, o_t, m_t, EPS: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return 1 / normaliser and the gradient of the sum of weights, for each token."""
    total = tl.load(den + o_t, mask=m_t, other=1.0)
    inverse = tl.where(m_t, 1.0 / divisor(total, EPS, NORMALIZE), 0.0)
    return inverse, -divisor_slope(total, EPS, NORMALIZE) * tl.sum(do * o, 1) * inverse


@triton.jit
def turn_gradients(
    turn, b_df, dpositions, positions, freq, o_t, o_w, m_t, W, L,
    WANT_POSITIONS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return b_df plus the gradient of frequencies [BW, BL], and store the gradient of positions.

    Both lack the factor 2 pi.
    """
    BL: tl.constexpr = b_df.shape[1]
    PRECISION: tl.constexpr = "ieee" if ACC == tl.float64 else "tf32x3"
    o_l = tl.arange(0, BL)
    m_l = o_l[None, :] < L
    at = o_t[:, None].to(tl.int64) * L + o_l[None, :]
    m_p = m_t[:, None] & m_l
    position = tl.load(positions + at, mask=m_p, other=0.0).to(ACC)
    if WANT_POSITIONS:
        m_f = (o_w < W)[:, None] & m_l
        f = tl.load(freq + o_w[:, None] * L + o_l[None, :], mask=m_f, other=0.0).to(ACC)
        if BL == 1:
            by_position = tl.sum(turn * tl.trans(f), 1, keep_dims=True)
        else:
            by_position = dot(turn, f, tl.zeros(position.shape, ACC), ACC, PRECISION)
        tl.store(dpositions + at, by_position, mask=m_p)
    if BL == 1:
        return b_df + tl.sum(turn * position, 0)[:, None]
    else:
        return dot(tl.trans(turn), position, b_df, ACC, PRECISION)


@triton.jit
def store_frequencies(dfreq, b_df, o_w, W, L):
    """Store the gradient of frequencies [W, L]."""
    o_l = tl.arange(0, b_df.shape[1])
    mask = (o_w < W)[:, None] & (o_l < L)[None, :]
    tl.store(dfreq + o_w[:, None] * L + o_l[None, :], b_df, mask=mask)


@triton.jit(do_not_specialize=["T", "S", "SEG", "NSEG", "NH", "NS"])
def grad_q_kernel(
    q, k, v, o, do, den, delta, s0, z0, dq, positions, freq, slots, dpositions, dfreq,
    T, H, D, E, W, L, S, GK, GV, SEG, NSEG,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    position_b, freq_h, G0, NH, NS, s0_size, z0_size,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, SLOPE: tl.constexpr, ENCODE: tl.constexpr, ADJOINT: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, MAP_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr, STATE: tl.constexpr, TURN: tl.constexpr, WANT_POSITIONS: tl.constexpr,
    RANGES: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of queries for a block of pairs, and delta, that of sums of weights."""
    NORM: tl.constexpr = NORMALIZE != "none"
    SPLIT: tl.constexpr = MAP_FIRST and PAIRS != "none"
    NORM_PARTS: tl.constexpr = 2 if SPLIT else PARTS
    BLOCKS = tl.cdiv(D if PAIRS == "none" else (D + 1) // 2, BW)
    i_bh, _, i_seg, i_block, begin, end, _ = place(slots, T, H, S, SEG, NSEG, BLOCKS, RANGES, False)
    i_b, i_h = i_bh // H, i_bh % H
    q += i_b * q_b + i_h * q_h
    k += i_b * k_b + i_h // GK * k_h
    v += i_b * v_b + i_h // GV * v_h
    o += (i_b * T * H + i_h) * E
    do += i_b * do_b + i_h * do_h
    dq += (i_b * T * H + i_h) * D
    den += i_bh * T
    delta += i_bh * T
    positions += i_b * position_b
    freq += i_h * freq_h
    s0 += (i_bh // G0 * NH + i_seg * NS) * s0_size
    z0 += (i_bh // G0 * NH + i_seg * NS) * z0_size

    o_c, o_w, o_e = tl.arange(0, C), i_block * BW + tl.arange(0, BW), tl.arange(0, BE)
    s_1, s_2 = load_state(s0, o_w, o_e, D, W, E, PAIRS, PARTS, ACC, STATE)
    z_1, z_2 = load_sums(z0, o_w, D, W, PAIRS, NORM_PARTS, ACC, STATE and NORM)
    b_df = tl.zeros((BW, BL), ACC)
    seen = o_c[:, None] >= o_c[None, :]
    for i in range(tl.cdiv(end - begin, C)):
        o_t = begin + i * C + o_c
        m_t = o_t < end
        cos, sin = angles(positions, freq, o_t, o_w, m_t, W, L, SCALE, PAIRS, ACC)
        g = load_rows(do, o_t, o_e, do_t, m_t, o_e < E, ACC)
        if NORM:
            b_o = load_rows(o, o_t, o_e, H * E, m_t, o_e < E, ACC)
            inverse, b_delta = token_weights(g, b_o, den, o_t, m_t, EPS, NORMALIZE)
            tl.store(delta + o_t, b_delta, mask=m_t & (i_block == 0))
            g *= inverse[:, None]
        b_v = load_rows(v, o_t, o_e, v_t, m_t, o_e < E, DOT)
        k_1, k_2 = load_pairs(k, o_t, o_w, k_t, m_t, D, W, PAIRS, ACC)
        psi_1, psi_2, kd_1, kd_2 = features(
            k_1, k_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
        )
        w = dot(g, tl.trans(b_v), tl.zeros((C, C), ACC), DOT, PRECISION)
        dn_1, dn_2 = 0.0, 0.0
        if NORM:
            if SPLIT:
                ones = tl.where(seen, 1.0, 0.0)
                zero = tl.zeros((C, BW), ACC)
                dn_1 = b_delta[:, None] * (dot(ones, kd_1, zero, DOT, PRECISION) + z_1[None, :])
                dn_2 = b_delta[:, None] * (dot(ones, kd_2, zero, DOT, PRECISION) + z_2[None, :])
            else:
                w += b_delta[:, None]
                dn_1 = b_delta[:, None] * z_1[None, :]
                dn_2 = b_delta[:, None] * z_2[None, :]
            z_1 += tl.sum(kd_1.to(ACC), 0)
            if NORM_PARTS == 2:
                z_2 += tl.sum(kd_2.to(ACC), 0)
        w = tl.where(seen, w, 0.0)
        dy_1 = dot(g, tl.trans(s_1), tl.zeros((C, BW), ACC), DOT, PRECISION)
        dy_1 = dot(w, psi_1, dy_1, DOT, PRECISION)
        s_1 = dot(tl.trans(psi_1), b_v, s_1, DOT, PRECISION)
        dy_2 = dy_1
        if PARTS == 2:
            dy_2 = dot(g, tl.trans(s_2), tl.zeros((C, BW), ACC), DOT, PRECISION)
            dy_2 = dot(w, psi_2, dy_2, DOT, PRECISION)
            s_2 = dot(tl.trans(psi_2), b_v, s_2, DOT, PRECISION)
        q_1, q_2 = load_pairs(q, o_t, o_w, q_t, m_t, D, W, PAIRS, ACC)
        dq_1, dq_2, turn = features_adjoint(
            dy_1, dy_2, dn_1, dn_2, q_1, q_2, cos, sin, PSI, SLOPE, ENCODE, ADJOINT, MAP_FIRST
        )
        store_pairs(dq, dq_1, dq_2, o_t, o_w, H * D, m_t, D, W, PAIRS)
        if TURN:
            at = (i_block * (tl.num_programs(0) // BLOCKS // NSEG) + i_bh) * T * L
            b_df = turn_gradients(
                turn, b_df, dpositions + at, positions, freq, o_t, o_w, m_t, W, L,
                WANT_POSITIONS, ACC,
            )  # fmt: skip
    if TURN:
        store_frequencies(dfreq + (i_bh * NSEG + i_seg) * W * L, b_df, o_w, W, L)


@triton.jit(do_not_specialize=["T", "S", "SEG", "NSEG", "NH", "NS"])
def grad_kv_kernel(
    q, k, v, do, den, delta, t0, y0, dk, dv, ds0, dz0, positions, freq, slots, dpositions, dfreq,
    T, H, D, E, W, L, S, GK, GV, SEG, NSEG,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    position_b, freq_h, G0, NH, NS, t0_size, y0_size,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, SLOPE: tl.constexpr, ENCODE: tl.constexpr, ADJOINT: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, MAP_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr, STATE: tl.constexpr, TURN: tl.constexpr, WANT_POSITIONS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, WANT_STATE: tl.constexpr, RANGES: tl.constexpr,
    C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of keys, values and the initial state.

    dk needs all columns of the values in one block, dv all pairs of the keys.
    """
    NORM: tl.constexpr = NORMALIZE != "none"
    SPLIT: tl.constexpr = MAP_FIRST and PAIRS != "none"
    NORM_PARTS: tl.constexpr = 2 if SPLIT else PARTS
    BLOCKS_E = tl.cdiv(E, BE)
    BLOCKS = tl.cdiv(D if PAIRS == "none" else (D + 1) // 2, BW) * BLOCKS_E
    i_bh, i_sh, i_seg, i_block, begin, end, closes = place(
        slots, T, H, S, SEG, NSEG, BLOCKS, RANGES, True
    )
    i_b, i_h = i_bh // H, i_bh % H
    q += i_b * q_b + i_h * q_h
    k += i_b * k_b + i_h // GK * k_h
    v += i_b * v_b + i_h // GV * v_h
    do += i_b * do_b + i_h * do_h
    dk += (i_b * T * H + i_h) * D
    dv += (i_b * T * H + i_h) * E
    den += i_bh * T
    delta += i_bh * T
    positions += i_b * position_b
    freq += i_h * freq_h
    t0 += (i_bh // G0 * NH + i_seg * NS) * t0_size
    y0 += (i_bh // G0 * NH + i_seg * NS) * y0_size

    o_c = tl.arange(0, C)
    o_w = i_block // BLOCKS_E * BW + tl.arange(0, BW)
    o_e = i_block % BLOCKS_E * BE + tl.arange(0, BE)
    # over later tokens, t sums phi (x) g and y sums delta pd
    t_1, t_2 = load_state(t0, o_w, o_e, D, W, E, PAIRS, PARTS, ACC, STATE)
    y_1, y_2 = load_sums(y0, o_w, D, W, PAIRS, NORM_PARTS, ACC, STATE and NORM)
    b_df = tl.zeros((BW, BL), ACC)
    # rows are keys, columns queries
    seen = o_c[:, None] <= o_c[None, :]
    chunks = tl.cdiv(end - begin, C)
    for i in range(chunks):
        o_t = begin + (chunks - 1 - i) * C + o_c
        m_t = o_t < end
        cos, sin = angles(positions, freq, o_t, o_w, m_t, W, L, SCALE, PAIRS, ACC)
        g = load_rows(do, o_t, o_e, do_t, m_t, o_e < E, ACC)
        if NORM:
            total = tl.load(den + o_t, mask=m_t, other=1.0)
            g /= divisor(total, EPS, NORMALIZE)[:, None]
        q_1, q_2 = load_pairs(q, o_t, o_w, q_t, m_t, D, W, PAIRS, ACC)
        k_1, k_2 = load_pairs(k, o_t, o_w, k_t, m_t, D, W, PAIRS, ACC)
        phi_1, phi_2, pd_1, pd_2 = features(
            q_1, q_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
        )
        if WANT_DV:
            psi_1, psi_2, _, _ = features(
                k_1, k_2, cos, sin, o_w, m_t, D, W, PSI, ENCODE, MAP_FIRST, PAIRS, PARTS, DOT
            )
            w = products(
                psi_1, psi_2, tl.trans(phi_1), tl.trans(phi_2), tl.zeros((C, C), ACC), PARTS,
                DOT, PRECISION,
            )  # fmt: skip
            b_dv = tl.zeros((C, BE), ACC)
            b_dv = products(psi_1, psi_2, t_1, t_2, b_dv, PARTS, DOT, PRECISION)
            b_dv = dot(tl.where(seen, w, 0.0), g, b_dv, DOT, PRECISION)
            store_rows(dv, b_dv, o_t, o_e, H * E, m_t, o_e < E)
        if WANT_DK:
            b_v = load_rows(v, o_t, o_e, v_t, m_t, o_e < E, DOT)
            w = dot(b_v, tl.trans(g), tl.zeros((C, C), ACC), DOT, PRECISION)
            dn_1, dn_2 = 0.0, 0.0
            if NORM:
                b_delta = tl.load(delta + o_t, mask=m_t, other=0.0)
                dn_1, dn_2 = y_1[None, :], y_2[None, :]
                pd_1, pd_2 = pd_1.to(ACC) * b_delta[:, None], pd_2.to(ACC) * b_delta[:, None]
                if SPLIT:
                    ones = tl.where(seen, 1.0, 0.0)
                    zero = tl.zeros((C, BW), ACC)
                    dn_1 += dot(ones, pd_1, zero, DOT, PRECISION)
                    dn_2 += dot(ones, pd_2, zero, DOT, PRECISION)
                else:
                    w += b_delta[None, :]
                y_1 += tl.sum(pd_1, 0)
                if NORM_PARTS == 2:
                    y_2 += tl.sum(pd_2, 0)
            w = tl.where(seen, w, 0.0)
            dy_1 = dot(b_v, tl.trans(t_1), tl.zeros((C, BW), ACC), DOT, PRECISION)
            dy_1 = dot(w, phi_1, dy_1, DOT, PRECISION)
            dy_2 = dy_1
            if PARTS == 2:
                dy_2 = dot(b_v, tl.trans(t_2), tl.zeros((C, BW), ACC), DOT, PRECISION)
                dy_2 = dot(w, phi_2, dy_2, DOT, PRECISION)
            dk_1, dk_2, turn = features_adjoint(
                dy_1, dy_2, dn_1, dn_2, k_1, k_2, cos, sin, PSI, SLOPE, ENCODE, ADJOINT, MAP_FIRST
            )
            store_pairs(dk, dk_1, dk_2, o_t, o_w, H * D, m_t, D, W, PAIRS)
            if TURN:
                at = (i_block * (tl.num_programs(0) // BLOCKS // NSEG) + i_bh) * T * L
                b_df = turn_gradients(
                    turn, b_df, dpositions + at, positions, freq, o_t, o_w, m_t, W, L,
                    WANT_POSITIONS, ACC,
                )  # fmt: skip
        t_1 = dot(tl.trans(phi_1), g, t_1, DOT, PRECISION)
        if PARTS == 2:
            t_2 = dot(tl.trans(phi_2), g, t_2, DOT, PRECISION)

    if WANT_STATE and closes:
        R = feature_count(D, W, PAIRS, PARTS)
        store_state(ds0 + i_sh * R * E, t_1, t_2, o_w, o_e, D, W, E, PAIRS, PARTS)
        if NORM and WANT_DK:
            RZ = feature_count(D, W, PAIRS, NORM_PARTS)
            store_sums(dz0 + i_sh * RZ, y_1, y_2, o_w, o_w >= 0, D, W, PAIRS, NORM_PARTS)
    if TURN and WANT_DK:
        store_frequencies(dfreq + (i_bh * NSEG + i_seg) * W * L, b_df, o_w, W, L)
