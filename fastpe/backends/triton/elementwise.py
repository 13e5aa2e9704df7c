"""Device functions of rotations and feature maps, given to kernels as constexprs.

The reference backend specifies them. A tile of queries or keys is a pair of blocks, x1 and x2: the
first and second components of rotated pairs. Without rotation it is one block, given twice.
"""

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.283185307179586)
RELU_SHIFT = tl.constexpr(1e-3)
# adding and subtracting ROUND rounds a float32 to the nearest integer
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def identity(x):
    """Return x."""
    return x


@triton.jit
def identity_slope(x, value):
    """Return 1."""
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def elu1(x):
    """Return elu(x) + 1."""
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def elu1_slope(x, value):
    """Return 1 above zero, the value below."""
    return tl.where(x > 0, 1.0, value)


@triton.jit
def relu(x):
    """Return max(x, 0) + 1e-3."""
    return tl.where(x < 0, 0.0, x) + RELU_SHIFT


@triton.jit
def relu_slope(x, value):
    """Return 1 above zero."""
    return tl.where(x > 0, 1.0, 0.0).to(x.dtype)


@triton.jit
def exp(x):
    """Return e^x."""
    return tl.exp(x)


@triton.jit
def exp_slope(x, value):
    """Return the value."""
    return value


@triton.jit
def unrotated(x1, x2, c, s):
    """Return the components unchanged; its own adjoint."""
    return x1, x2


@triton.jit
def rotate(x1, x2, c, s):
    """Rotate each pair by its angle (RoPE)."""
    return x1 * c - x2 * s, x2 * c + x1 * s


@triton.jit
def rotate_adjoint(y1, y2, c, s):
    """Rotate each pair back."""
    return y1 * c + y2 * s, y2 * c - y1 * s


@triton.jit
def rotate_pool(x1, x2, c, s):
    """Return the sum of each rotated pair (RoPEPool, arXiv 2504.05364, eq. 23), twice."""
    y = x1 * (c + s) + x2 * (c - s)
    return y, y


@triton.jit
def rotate_pool_adjoint(y1, y2, c, s):
    """Return the gradient of each pair from that of its sum."""
    return y1 * (c + s), y1 * (c - s)


@triton.jit
def nearest(x):
    """Round to the nearest integer."""
    if x.dtype == tl.float64:
        return tl.floor(x + 0.5)
    else:
        return (x + ROUND) - ROUND


@triton.jit
def split(x):
    """Return two float32 whose sum is the float64 x to 48 bits."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def turns(position, freq, ACC: tl.constexpr):
    """Return position * freq less whole turns; both are float64.

    With ACC float32 the product is exact to 48 bits. Few cards are fast in float64, so only the
    vectors are float64, not the tile.
    """
    if ACC == tl.float64:
        product = position * freq
        return product - nearest(product)
    else:
        position_high, position_low = split(position)
        freq_high, freq_low = split(freq)
        whole = nearest(position_high * freq_high)
        rest = tl.fma(position_high, freq_high, -whole)
        return rest + (position_high * freq_low + position_low * freq_high)


@triton.jit
def sincos_turns(u):
    """Return sin and cos of 2 pi u, |u| < 2^22, to about 1e-7 in float32."""
    if u.dtype == tl.float64:
        return tl.sin(u * TWO_PI), tl.cos(u * TWO_PI)
    else:
        u -= nearest(u)
        quarter = nearest(u * 4.0)  # -2, -1, 0, 1 or 2
        t = (u - quarter * 0.25) * TWO_PI
        z = t * t
        s = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
        c = (z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2
        c = c * z * z - z * 0.5 + 1.0
        square = quarter * quarter
        sin = tl.where(square == 1.0, c * quarter, tl.where(square == 4.0, -s, s))
        cos = tl.where(square == 1.0, -s * quarter, tl.where(square == 4.0, -c, c))
        return sin, cos
