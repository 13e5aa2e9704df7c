"""Kernel of the noise: Philox4x32-10 and Box-Muller in float64, as in the reference backend."""

import triton
import triton.language as tl

from .elementwise import TWO_PI


@triton.jit
def store_pair(out, x_0, x_1, o_r, R):
    """Store two normal numbers from two random words at o_r and o_r + 1."""
    u_0 = ((x_0 >> 9).to(tl.float64) + 0.5) * (1.0 / 8388608.0)
    u_1 = ((x_1 >> 9).to(tl.float64) + 0.5) * (1.0 / 8388608.0)
    radius, angle = tl.sqrt(tl.log(u_0) * -2.0), u_1 * TWO_PI
    tl.store(out + o_r, (radius * tl.cos(angle)).to(out.dtype.element_ty), mask=o_r < R)
    tl.store(out + o_r + 1, (radius * tl.sin(angle)).to(out.dtype.element_ty), mask=o_r + 1 < R)


@triton.jit(do_not_specialize=["module", "first"])
def normal_kernel(out, seed, step, module, first, J, R, BLOCK: tl.constexpr):
    """Store row first + j of component hd, [R]; module is 8 * module id + kind."""
    i_row = tl.program_id(0)
    o_block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed) ^ (module.to(tl.int64) << 32)
    zero = tl.zeros((BLOCK,), tl.uint32)
    c_1, c_2 = zero + (i_row % J).to(tl.uint32), zero + (i_row // J).to(tl.uint32)
    c_1 += first.to(tl.uint32)
    c_3 = zero + tl.load(step).to(tl.uint32)
    x_0, x_1, x_2, x_3 = tl.philox(key, o_block.to(tl.uint32), c_1, c_2, c_3)
    out += i_row.to(tl.int64) * R
    store_pair(out, x_0, x_1, 4 * o_block, R)
    store_pair(out, x_2, x_3, 4 * o_block + 2, R)
