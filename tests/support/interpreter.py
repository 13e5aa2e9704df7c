"""Triton's interpreter, mended where it is not what a card computes.

It multiplies the bits of bfloat16 as integers, truncates where a card rounds, and rounds twice in a
fused multiply-add. Import it after TRITON_INTERPRET=1 is set.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_create_dot, _create_fp_trunc = _Builder.create_dot, _Builder.create_fp_trunc


def _widened(x):
    # bfloat16 is kept as uint16: the upper half of a float32
    if x.dtype.scalar != tl.bfloat16:
        return x
    return _Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self, a, b, d, *options):
    return _create_dot(self, _widened(a), _widened(b), d, *options)


def _fp_trunc(self, src, dst_type):
    if dst_type.scalar != tl.bfloat16 or src.dtype.scalar != tl.float32:
        return _create_fp_trunc(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
    return _Handle(rounded.astype(np.uint16), tl.bfloat16)


def _fma(self, x, y, z):
    # the product of two float32 is exact in float64
    wide = x.data.astype(np.float64) * y.data + z.data
    return _Handle(wide.astype(z.data.dtype), z.dtype.scalar)


def mend():
    """Mend the interpreter of this process."""
    _Builder.create_dot, _Builder.create_fp_trunc, _Builder.create_fma = _dot, _fp_trunc, _fma
