"""Triton's interpreter, mended where it is not what a card computes.

It multiplies the bits of bfloat16 as integers, truncates where a card rounds, and rounds twice in a
fused multiply-add. It also does some work at each call of a device function that is needed once.
Import it after TRITON_INTERPRET=1 is set.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_create_dot, _create_fp_trunc = _Builder.create_dot, _Builder.create_fp_trunc
_run, _np_dtype = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
# modules whose view of the language is the interpreter's, while a kernel runs
_patched = set()


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


def _kernel(self, *args, **options):
    # behind a kernel the interpreter restores the language
    _patched.clear()
    return _run(self, *args, **options)


def _device_function(self, *args, **options):
    # the interpreter itself looks through the whole language at each call: half of all time
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **options)


@functools.cache
def _np_dtype_of(name):
    return _np_dtype(tl.dtype(name))


def _cached_np_dtype(x):
    # the interpreter itself makes a table of all dtypes at each operation
    scalar = x.element_ty if isinstance(x, tl.block_type) else x
    return _np_dtype_of(scalar.name) if type(scalar) is tl.dtype else _np_dtype(x)


def mend():
    """Mend the interpreter of this process."""
    interpreter.GridExecutor.__call__ = _kernel
    interpreter.InterpretedFunction.__call__ = _device_function
    interpreter._get_np_dtype = _cached_np_dtype
    _Builder.create_dot, _Builder.create_fp_trunc, _Builder.create_fma = _dot, _fp_trunc, _fma
