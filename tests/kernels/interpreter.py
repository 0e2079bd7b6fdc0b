"""What Triton's interpreter gets wrong on a CPU, put right for tests. Import before any module that defines kernels.

The interpreter keeps bf16 as raw 16-bit integers and computes on those bits, and rounds fp32 to bf16 by cutting. Here
every operation on bf16 runs in fp32 and rounds to nearest even, as a GPU does.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _widen(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(x):
    return isinstance(x, _Handle) and x.dtype.scalar == tl.bfloat16


def _fp32(x):
    return _Handle(_widen(x.data), tl.float32) if _is_bf16(x) else x


def _bf16(x):
    return _Handle(_round(x.data), tl.bfloat16)


def _through_fp32(name):
    plain = getattr(_Builder, name)

    @functools.wraps(plain)
    def wrapped(self, *args, **kwargs):
        if not any(_is_bf16(x) for x in args):
            return plain(self, *args, **kwargs)
        result = plain(self, *(_fp32(x) for x in args), **kwargs)
        is_float = isinstance(result, _Handle) and result.data.dtype == np.float32
        return _bf16(result) if is_float else result

    setattr(_Builder, name, wrapped)


_ARITHMETIC = ("fadd", "fmul", "fdiv", "fsub", "precise_divf", "minimumf", "minnumf", "maximumf", "maxnumf", "fma")
_FUNCTIONS = ("exp", "exp2", "log", "log2", "precise_sqrt", "sqrt", "erf", "rsqrt", "clampf", "sin", "cos", "floor")
for _name in dir(_Builder):
    if _name.removeprefix("create_") in (*_ARITHMETIC, *_FUNCTIONS) or _name.startswith("create_fcmp"):
        _through_fp32(_name)

_dot, _cast, _reduce = _Builder.create_dot, _Builder.cast_impl, interpreter.ReduceScanOpInterface.apply


def _create_dot(self, a, b, accumulator, *args, **kwargs):
    result = _dot(self, _fp32(a), _fp32(b), _fp32(accumulator), *args, **kwargs)
    return _bf16(result) if _is_bf16(accumulator) else result


def _cast_impl(self, source, wanted):
    have, want = source.dtype.scalar, wanted.scalar
    if have == tl.bfloat16 and want != tl.bfloat16:
        wide = _fp32(source)
        return wide if want == tl.float32 else _cast(self, wide, wanted)
    if want == tl.bfloat16 and have != tl.bfloat16:
        return _bf16(_Handle(np.asarray(source.data).astype(np.float32), tl.float32))
    return _cast(self, source, wanted)


def _create_fp_to_fp(self, source, wanted, rounding=None):
    return _cast_impl(self, source, wanted)


def _reduce_scan(self, values):
    def widen(x):
        return x.to(tl.float32) if isinstance(x, tl.tensor) and x.dtype.scalar == tl.bfloat16 else x

    return _reduce(self, tuple(map(widen, values)) if isinstance(values, tuple) else widen(values))


_Builder.create_dot = _create_dot
_Builder.cast_impl = _cast_impl
_Builder.create_fp_to_fp = _create_fp_to_fp
interpreter.ReduceScanOpInterface.apply = _reduce_scan

_patch_tensor = interpreter._patch_lang_tensor


def _index_any_scalar(tensor, scope):
    """Triton 3.6 with numpy >= 2.4: range(0, scalar) needs an integer of a one-element array."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


interpreter._patch_lang_tensor = _index_any_scalar
