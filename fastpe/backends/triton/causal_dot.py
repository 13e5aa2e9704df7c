"""Kernels of causal linear attention: the scan in its roles.

    kernel           a    b    c      tokens      out
    forward_kernel   phi  psi  v      in order    o
    grad_q_kernel    g    v    psi    in order    dq
    grad_kv_kernel   v    g    phi    backwards   dk
                     psi  phi  g      backwards   dv (by the same tiles, its state is the transpose)

Each computes out_t = sum_{s<=t} (a_t . b_s) c_s + a_t S inside a chunk, where S is the sum of
b (x) c over the tokens before the chunk. phi and psi are the features of q and k, and
g = grad_o / normaliser.

A program owns a segment of one head of one sequence and a block of columns of the result. It walks
the segment chunk by chunk with the state in registers. If heads are cut into segments, to give the
whole card work, `state_kernel` and `prefix_kernel` make the states that segments begin with.

With RANGES one row of tokens holds S sequences. It has NSEG slots for segments: first the S first
segments, then one slot for each SEG tokens in which another segment may begin. `slots_kernel` fills
the slots; an empty slot has no tokens.
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


@triton.jit(do_not_specialize=["S", "SEG"])
def slots_kernel(ranges, slots, S, SEG):
    """Store six numbers for each slot, for `place` and `state_kernel`.

    They are: first token and end of the segment, its sequence, whether it is the last of the
    sequence, and the ends of the tokens that it adds to the states of later and of earlier
    segments (its first token if it adds nothing).

    The first S slots are the first segments of the sequences. Every other segment follows SEG
    tokens of its own sequence, so no two begin in the same SEG tokens of the row.
    """
    i_seg = tl.program_id(0)
    i_s = i_seg.to(tl.int64)
    begin = i_s * 0
    last = begin
    if i_seg < S:
        begin = tl.load(ranges + 2 * i_s)
        last = tl.load(ranges + 2 * i_s + 1)
    else:
        i_s = begin
        for i in range(0, S, 128):
            o_s = (i + tl.arange(0, 128)).to(tl.int64)
            first = tl.load(ranges + 2 * o_s, mask=o_s < S, other=0)
            behind = tl.load(ranges + 2 * o_s + 1, mask=o_s < S, other=0)
            at = (i_seg - S + 1) * SEG + first % SEG
            here = (at > first) & (at < behind)
            i_s += tl.sum(tl.where(here, o_s, 0))
            begin += tl.sum(tl.where(here, at, 0))
            last += tl.sum(tl.where(here, behind, 0))
    end = tl.minimum(begin + SEG, last)
    closes = (end == last) & ((i_seg < S) | (last > 0))
    slots += 6 * i_seg
    tl.store(slots, begin)
    tl.store(slots + 1, end)
    tl.store(slots + 2, i_s)
    tl.store(slots + 3, closes.to(tl.int64))
    tl.store(slots + 4, tl.where(closes, begin, end))
    tl.store(slots + 5, tl.where(i_seg < S, begin, end))


@triton.jit
def place(slots, T, H, S, SEG, NSEG, BLOCKS, RANGES: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return the place of a program.

    It is: index of row and head, index of sequence and head, slot of the segment, block of columns,
    first token, end, and whether the segment is the last of its sequence to be walked.
    """
    pid = tl.program_id(0)
    i_block = pid % BLOCKS
    i_seg = pid // BLOCKS % NSEG
    i_bh = (pid // BLOCKS // NSEG).to(tl.int64)
    if RANGES:
        slots += 6 * i_seg
        begin, end = tl.load(slots).to(T.dtype), tl.load(slots + 1).to(T.dtype)
        i_sh = tl.load(slots + 2) * H + i_bh
        closes = i_seg < S if BACKWARDS else tl.load(slots + 3) != 0
        return i_bh, i_sh, i_seg, i_block, begin, end, closes
    else:
        begin = i_seg * SEG
        closes = i_seg == (0 if BACKWARDS else NSEG - 1)
        return i_bh, i_bh, i_seg, i_block, begin, tl.minimum(begin + SEG, T), closes


@triton.jit
def divisor(den, eps, NORMALIZE: tl.constexpr):
    """Return the divisor of the weighted sum."""
    if NORMALIZE == "sum":
        return den + eps
    else:
        return tl.maximum(tl.abs(den), eps)


@triton.jit
def divisor_slope(den, eps, NORMALIZE: tl.constexpr):
    """Return the derivative of `divisor`, 0 where it is clamped."""
    if NORMALIZE == "sum":
        return tl.full(den.shape, 1.0, den.dtype)
    else:
        return tl.where(tl.abs(den) < eps, 0.0, tl.where(den < 0, -1.0, 1.0)).to(den.dtype)


@triton.jit
def products(
    x_1, x_2, y_1, y_2, acc, PARTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Return acc + x @ y; the columns of x and the rows of y are in PARTS blocks."""
    acc = dot(x_1, y_1, acc, DOT, PRECISION)
    if PARTS == 2:
        acc = dot(x_2, y_2, acc, DOT, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "S", "SEG", "NSEG", "NH", "NS"])
def forward_kernel(
    q, k, v, o, den, s0, z0, s, z, positions, freq, slots,
    T, H, D, E, W, L, S, GK, GV, GS, SEG, NSEG,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, position_b, freq_h,
    G0, NH, NS, s0_size, z0_size,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, ENCODE: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
    MAP_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, STATE: tl.constexpr, RANGES: tl.constexpr,
    C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store outputs for a block of columns of the values, sums of weights, and the final state."""
    NORM: tl.constexpr = NORMALIZE != "none"
    # the normaliser sees unrotated features
    SPLIT: tl.constexpr = MAP_FIRST and PAIRS != "none"
    NORM_PARTS: tl.constexpr = 2 if SPLIT else PARTS
    i_bh, i_sh, i_seg, i_block, begin, end, closes = place(
        slots, T, H, S, SEG, NSEG, tl.cdiv(E, BE), RANGES, False
    )
    i_b, i_h = i_bh // H, i_bh % H
    q += i_b * q_b + i_h * q_h
    k += i_b * k_b + i_h // GK * k_h
    v += i_b * v_b + i_h // GV * v_h
    o += (i_b * T * H + i_h) * E
    den += i_bh * T
    positions += i_b * position_b
    freq += i_h * freq_h
    s0 += (i_bh // G0 * NH + i_seg * NS) * s0_size
    z0 += (i_bh // G0 * NH + i_seg * NS) * z0_size

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

    # of the heads that share a state, the first stores it
    if closes & (i_sh % GS == 0):
        R = feature_count(D, W, PAIRS, PARTS)
        store_state(s + i_sh // GS * R * E, s_1, s_2, o_w, o_e, D, W, E, PAIRS, PARTS)
        if NORM:
            RZ = feature_count(D, W, PAIRS, NORM_PARTS)
            store_sums(z + i_sh // GS * RZ, z_1, z_2, o_w, i_block == 0, D, W, PAIRS, NORM_PARTS)


@triton.jit(do_not_specialize=["T", "S", "SEG", "NSEG"])
def state_kernel(
    x, y, den, delta, states, positions, freq, slots,
    T, H, D, E, W, L, S, GX, GY, SEG, NSEG,
    x_b, x_t, x_h, y_b, y_t, y_h, position_b, freq_h,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    PSI: tl.constexpr, ENCODE: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
    MAP_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARDS: tl.constexpr,
    RANGES: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the sums that each segment adds to the state: psi and v, BACKWARDS phi and g."""
    NORM: tl.constexpr = NORMALIZE != "none"
    NORM_PARTS: tl.constexpr = 2 if MAP_FIRST and PAIRS != "none" else PARTS
    i_bh, _, i_seg, i_block, begin, end, closes = place(
        slots, T, H, S, SEG, NSEG, tl.cdiv(E, BE), RANGES, BACKWARDS
    )
    # no segment follows the last one, so its sums are not needed
    if RANGES:  # no register is left for tl.where
        end = tl.load(slots + 6 * i_seg + (5 if BACKWARDS else 4)).to(T.dtype)
    else:
        end = tl.where(closes, begin, end)
    i_b, i_h = i_bh // H, i_bh % H
    x += i_b * x_b + i_h // GX * x_h
    y += i_b * y_b + i_h // GY * y_h
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


@triton.jit(do_not_specialize=["H", "S", "SEG", "NSEG"])
def prefix_kernel(
    states, s0, z0, ranges, H, S, SEG, NSEG, G0, RE, RZ,
    STATE: tl.constexpr, BACKWARDS: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Replace the sums of each segment by the state before it (BACKWARDS: behind it)."""
    i_sh = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < RE + RZ
    total = tl.zeros((BLOCK,), ACC)
    if STATE:
        total = tl.load(s0 + i_sh // G0 * RE + o, mask=o < RE, other=0.0)
        total += tl.load(z0 + i_sh // G0 * RZ + o - RE, mask=(o >= RE) & mask, other=0.0)
    if RANGES:
        i_s = i_sh // H
        first, last = tl.load(ranges + 2 * i_s), tl.load(ranges + 2 * i_s + 1)
        states += i_sh % H * NSEG * (RE + RZ)
        # an empty sequence has one segment
        count = tl.maximum(tl.cdiv(last - first, SEG), 1)
    else:
        states += i_sh * NSEG * (RE + RZ)
        count = NSEG
    for i in range(count):
        i_seg = count - 1 - i if BACKWARDS else i
        if RANGES:  # the segment's slot, see `slots_kernel`
            i_seg = tl.where(i_seg == 0, i_s, S - 1 + first // SEG + i_seg)
        at = states + i_seg * (RE + RZ) + o
        added = tl.load(at, mask=mask, other=0.0)
        # all threads load before any of them stores
        tl.debug_barrier()
        tl.store(at, total, mask=mask)
        total += added
