"""Tiles of queries and keys: load, store, and compute features.

A tile is a pair of blocks [C, BW], `_1` and `_2`: the first and second components of rotated pairs.
Without rotation (PAIRS == "none") it is one block, given twice.
"""

import triton
import triton.language as tl

from .elementwise import sincos_turns, turns


@triton.jit
def dot(x, y, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x @ y with operands of type DOT."""
    return tl.dot(x.to(DOT), y.to(DOT), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def columns(o_w, D, W, PAIRS: tl.constexpr):
    """Return the columns of both components of the pairs o_w, and their masks.

    Components after the last rotated pair form pairs that do not rotate.
    """
    m_w = o_w < (D + 1) // 2
    if PAIRS == "none":
        return o_w, o_w, o_w < D, o_w < D
    elif PAIRS == "neighbours":
        return 2 * o_w, 2 * o_w + 1, m_w, 2 * o_w + 1 < D
    elif PAIRS == "halves":
        return o_w, o_w + W, m_w, m_w
    else:
        first = tl.where(o_w < W, o_w, o_w + W)
        second = first + tl.where(o_w < W, W, (D - 2 * W + 1) // 2)
        return first, second, m_w, m_w & (second < D)


@triton.jit
def load_rows(x, o_t, o_c, stride, m_t, m_c, ACC: tl.constexpr):
    """Return the columns o_c of the tokens o_t, with zeros where masked."""
    at = o_t[:, None].to(tl.int64) * stride + o_c[None, :]
    return tl.load(x + at, mask=m_t[:, None] & m_c[None, :], other=0.0).to(ACC)


@triton.jit
def store_rows(x, value, o_t, o_c, stride, m_t, m_c):
    """Store the columns o_c of the tokens o_t."""
    at = o_t[:, None].to(tl.int64) * stride + o_c[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


@triton.jit
def neighbours(o_w):
    """Return the columns of all components of the consecutive pairs o_w."""
    return 2 * tl.min(o_w, 0) + tl.arange(0, 2 * o_w.shape[0])


@triton.jit
def load_pairs(x, o_t, o_w, stride, m_t, D, W, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """Return the two blocks of the pairs o_w."""
    if PAIRS == "neighbours":
        # a wide load of whole rows can be pipelined
        o_d = neighbours(o_w)
        tile = load_rows(x, o_t, o_d, stride, m_t, o_d < D, ACC)
        return tl.split(tl.reshape(tile, (o_t.shape[0], o_w.shape[0], 2)))
    else:
        c_1, c_2, m_1, m_2 = columns(o_w, D, W, PAIRS)
        x_1 = load_rows(x, o_t, c_1, stride, m_t, m_1, ACC)
        x_2 = x_1
        if PAIRS != "none":
            x_2 = load_rows(x, o_t, c_2, stride, m_t, m_2, ACC)
        return x_1, x_2


@triton.jit
def store_pairs(x, x_1, x_2, o_t, o_w, stride, m_t, D, W, PAIRS: tl.constexpr):
    """Store the two blocks of the pairs o_w."""
    if PAIRS == "neighbours":
        o_d = neighbours(o_w)
        tile = tl.reshape(tl.join(x_1, x_2), (o_t.shape[0], 2 * o_w.shape[0]))
        store_rows(x, tile, o_t, o_d, stride, m_t, o_d < D)
    else:
        c_1, c_2, m_1, m_2 = columns(o_w, D, W, PAIRS)
        store_rows(x, x_1, o_t, c_1, stride, m_t, m_1)
        if PAIRS != "none":
            store_rows(x, x_2, o_t, c_2, stride, m_t, m_2)


@triton.jit
def angles(positions, freq, o_t, o_w, m_t, W, L, scale, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """Return scale times cos and sin of 2 pi freq . position, [C, BW] each."""
    if PAIRS == "none":
        return 1.0, 0.0
    else:
        u = tl.zeros((o_t.shape[0], o_w.shape[0]), ACC)
        for i in range(L):
            position = tl.load(positions + o_t.to(tl.int64) * L + i, mask=m_t, other=0.0)
            f = tl.load(freq + o_w * L + i, mask=o_w < W, other=0.0)
            u += turns(position[:, None], f[None, :], ACC)
        s, c = sincos_turns(u)
        return c * scale, s * scale


@triton.jit
def existing(x_1, x_2, o_w, m_t, D, W, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Return the blocks with zeros in missing tokens and columns."""
    m_1, m_2 = columns(o_w, D, W, PAIRS)[2:]
    # two masks of one dimension: a mask of two would stay in registers throughout the loop
    x_1 = tl.where(m_t[:, None], tl.where(m_1[None, :], x_1, 0.0), 0.0)
    if PARTS == 2:
        x_2 = tl.where(m_t[:, None], tl.where(m_2[None, :], x_2, 0.0), 0.0)
    else:
        x_2 = x_1
    return x_1, x_2


@triton.jit
def features(
    x_1, x_2, c, s, o_w, m_t, D, W,
    PSI: tl.constexpr, ENCODE: tl.constexpr, MAP_FIRST: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Return PARTS blocks of features of a tile, and the features that the normaliser sees.

    They are rounded to DOT here, so that weights and sums of weights use the same numbers.
    """
    if MAP_FIRST:
        n_1, n_2 = existing(PSI(x_1), PSI(x_2), o_w, m_t, D, W, PAIRS, 1 if PAIRS == "none" else 2)
        y_1, y_2 = ENCODE(n_1, n_2, c, s)
        return y_1.to(DOT), y_2.to(DOT), n_1.to(DOT), n_2.to(DOT)
    else:
        y_1, y_2 = ENCODE(x_1, x_2, c, s)
        y_1, y_2 = existing(PSI(y_1), PSI(y_2), o_w, m_t, D, W, PAIRS, PARTS)
        y_1, y_2 = y_1.to(DOT), y_2.to(DOT)
        return y_1, y_2, y_1, y_2


@triton.jit
def features_adjoint(
    dy_1, dy_2, dn_1, dn_2, x_1, x_2, c, s,
    PSI: tl.constexpr, SLOPE: tl.constexpr, ENCODE: tl.constexpr, ADJOINT: tl.constexpr,
    MAP_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the gradients of x and of each pair's angle from those of features."""
    if MAP_FIRST:
        n_1, n_2 = PSI(x_1), PSI(x_2)
        dx_1, dx_2 = ADJOINT(dy_1, dy_2, c, s)
        turn = n_1 * dx_2 - n_2 * dx_1
        return (dx_1 + dn_1) * SLOPE(x_1, n_1), (dx_2 + dn_2) * SLOPE(x_2, n_2), turn
    else:
        y_1, y_2 = ENCODE(x_1, x_2, c, s)
        dy_1 = (dy_1 + dn_1) * SLOPE(y_1, PSI(y_1))
        dy_2 = (dy_2 + dn_2) * SLOPE(y_2, PSI(y_2))
        dx_1, dx_2 = ADJOINT(dy_1, dy_2, c, s)
        return dx_1, dx_2, x_1 * dx_2 - x_2 * dx_1


@triton.jit
def feature_rows(o_w, D, W, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Return the indices of both blocks of features, and their masks."""
    c_1, c_2, m_1, m_2 = columns(o_w, D, W, PAIRS)
    if PAIRS != "none" and PARTS == 1:
        return o_w, o_w, m_1, m_1
    else:
        return c_1, c_2, m_1, m_2


@triton.jit
def feature_count(D, W, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Return the number of features."""
    if PAIRS != "none" and PARTS == 1:
        return W
    else:
        return D


@triton.jit
def load_state(
    s, o_w, o_e, D, W, E, PAIRS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Return both blocks of rows of a state [R, E], or zeros unless GIVEN."""
    s_1 = tl.zeros((o_w.shape[0], o_e.shape[0]), ACC)
    s_2 = s_1
    if GIVEN:
        r_1, r_2, m_1, m_2 = feature_rows(o_w, D, W, PAIRS, PARTS)
        m_e = (o_e < E)[None, :]
        s_1 = tl.load(s + r_1[:, None] * E + o_e[None, :], mask=m_1[:, None] & m_e, other=0.0)
        if PARTS == 2:
            s_2 = tl.load(s + r_2[:, None] * E + o_e[None, :], mask=m_2[:, None] & m_e, other=0.0)
    return s_1, s_2


@triton.jit
def store_state(s, s_1, s_2, o_w, o_e, D, W, E, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Store both blocks of rows of a state [R, E]."""
    r_1, r_2, m_1, m_2 = feature_rows(o_w, D, W, PAIRS, PARTS)
    m_e = (o_e < E)[None, :]
    tl.store(s + r_1[:, None] * E + o_e[None, :], s_1, mask=m_1[:, None] & m_e)
    if PARTS == 2:
        tl.store(s + r_2[:, None] * E + o_e[None, :], s_2, mask=m_2[:, None] & m_e)


@triton.jit
def load_sums(
    z, o_w, D, W, PAIRS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Return both blocks of sums of the normaliser's features, or zeros unless GIVEN."""
    z_1 = tl.zeros((o_w.shape[0],), ACC)
    z_2 = z_1
    if GIVEN:
        r_1, r_2, m_1, m_2 = feature_rows(o_w, D, W, PAIRS, PARTS)
        z_1 = tl.load(z + r_1, mask=m_1, other=0.0)
        if PARTS == 2:
            z_2 = tl.load(z + r_2, mask=m_2, other=0.0)
    return z_1, z_2


@triton.jit
def store_sums(z, z_1, z_2, o_w, m, D, W, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Store both blocks of sums of the normaliser's features, where m."""
    r_1, r_2, m_1, m_2 = feature_rows(o_w, D, W, PAIRS, PARTS)
    tl.store(z + r_1, z_1, mask=m_1 & m)
    if PARTS == 2:
        tl.store(z + r_2, z_2, mask=m_2 & m)
