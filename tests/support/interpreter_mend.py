"""Makes Triton's interpreter exact for bfloat16 and fp8; import before a kernel is launched.

The interpreter (3.7 to 3.9) keeps bfloat16 as raw 16-bit integers: arithmetic and dots work on the
bits, and casts to bfloat16 and fp8 truncate instead of rounding to nearest even. Here every
bfloat16 operand is widened to float32, computed, and rounded back with torch's own casts, which is
what a GPU does. Nested calls of jitted functions also skip patching ``triton.language`` again.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as interp

_TORCH_FLOATS = {
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}  # what torch reads raw bits from
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}

_Builder = interp.InterpreterBuilder
_convert_float = interp._convert_float
_binary_op = _Builder.binary_op
_unary_op = _Builder.unary_op
_create_rsqrt = _Builder.create_rsqrt
_create_fma = _Builder.create_fma
_create_clampf = _Builder.create_clampf
_create_dot = _Builder.create_dot
_reduce = interp.ReduceOps.apply_impl
_patch_lang = interp._patch_lang
_run_grid = interp.GridExecutor.__call__


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _convert(x, source, target, rounding):
    towards_zero = rounding == interp._ir.ROUNDING_MODE.RTZ
    if source not in _TORCH_FLOATS or target not in _TORCH_FLOATS or towards_zero:
        return _convert_float(x, source, target, rounding)
    bits = np.ascontiguousarray(x)
    values = torch.from_numpy(bits.view(_SIGNED[bits.itemsize]).copy()).view(_TORCH_FLOATS[source])
    wide = torch.float64 if source == tl.float64 else torch.float32
    rounded = values.to(wide).to(_TORCH_FLOATS[target])
    size = rounded.element_size()
    return rounded.view(_BITS[size]).numpy().view(_UNSIGNED[size]).reshape(x.shape)


def _widen(handle):
    if not _is_bfloat16(handle):
        return handle
    data = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interp.TensorHandle(data, tl.float32)


def _narrow(handle):
    return interp.TensorHandle(_convert(handle.data, tl.float32, tl.bfloat16, None), tl.bfloat16)


def _cast(self, source, target_type):
    target = target_type.scalar
    if _is_bfloat16(source):
        if target == tl.bfloat16:
            return source
        source = _widen(source)
    elif target == tl.bfloat16:
        return _narrow(interp.TensorHandle(source.data.astype(np.float32), tl.float32))
    return interp.TensorHandle(source.data.astype(interp._get_np_dtype(target_type)), target)


def _binary(self, left, right, op):
    if not _is_bfloat16(left) or op in _BITWISE:
        return _binary_op(self, left, right, op)
    result = _binary_op(self, _widen(left), _widen(right), op)
    return result if result.data.dtype == np.bool_ else _narrow(result)


def _widened(op, which):
    """Run a builder method in float32 if the operand number ``which`` is bfloat16."""

    def run(self, *args):
        if not _is_bfloat16(args[which]):
            return op(self, *args)
        widened = [_widen(a) if isinstance(a, interp.TensorHandle) else a for a in args]
        return _narrow(op(self, *widened))

    return run


def _dot(self, a, b, accumulator, *rest):
    result = _create_dot(self, _widen(a), _widen(b), _widen(accumulator), *rest)
    return _narrow(result) if _is_bfloat16(accumulator) else result


def _reduce_bfloat16(self, inputs):
    if len(inputs) != 1 or inputs[0].dtype.scalar != tl.bfloat16:
        return _reduce(self, inputs)
    (x,) = inputs
    wide = tl.core.tensor(_widen(x.handle), tl.block_type(tl.float32, list(x.shape)))
    result = _reduce(self, (wide,))
    result = result[0] if isinstance(result, list | tuple) else result
    shape = list(result.shape)
    result_type = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
    return tl.core.tensor(_narrow(result.handle), result_type)


class _AlreadyPatched:
    def restore(self):
        """Leave it to the outermost call."""


_depth = 0
_patched: set[int] = set()


def _patch_lang_once(fn):
    langs = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
    if _depth and langs <= _patched:
        return _AlreadyPatched()
    if _depth:
        _patched.update(langs)
    return _patch_lang(fn)


def _run_grid_counted(self, *args, **kwargs):
    global _depth
    _depth += 1
    try:
        return _run_grid(self, *args, **kwargs)
    finally:
        _depth -= 1
        if not _depth:
            _patched.clear()


interp._convert_float = _convert
interp._patch_lang = _patch_lang_once
interp.GridExecutor.__call__ = _run_grid_counted
interp.ReduceOps.apply_impl = _reduce_bfloat16
_Builder.cast_impl = _cast
_Builder.binary_op = _binary
_Builder.unary_op = _widened(_unary_op, 0)
_Builder.create_rsqrt = _widened(_create_rsqrt, 0)
_Builder.create_fma = _widened(_create_fma, 2)
_Builder.create_clampf = _widened(_create_clampf, 0)
_Builder.create_dot = _dot
