"""The gate of a SwiGLU MLP: ``silu(gate) * up`` of a merged projection.

Parallelism: one program per token and block of columns.
Numerics:    silu in float32, rounded before the product, as two torch calls would.
Source:      Shazeer 2020, arXiv:2002.05202.
"""

import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.checks import check_tensor

_BLOCK_SIZE = 1024


@triton.jit
def _silu_and_mul_kernel(
    out_ptr,  # [num_tokens, size]
    x_ptr,  # [num_tokens, 2 * size]
    x_stride,
    size,
    BLOCK_SIZE: tl.constexpr,
):
    # grid: (num_tokens, cdiv(size, BLOCK_SIZE))
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = columns < size
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    decayed = tl.exp(-tl.abs(gate))  # in (0, 1]: no overflow
    gate = gate * tl.where(gate < 0, decayed, 1.0) / (1.0 + decayed)
    gate = gate.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (gate * up).to(dtype), mask=inside)


def silu_and_mul(x: Tensor) -> Tensor:
    """Activate the first half and multiply it with the second.

    Args:
        x: ``[..., 2 * size]``, any float dtype; rows may be strided.

    Returns:
        ``[..., size]``.

    Raises:
        ValueError: The last dimension is odd or not contiguous.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: the last dimension, {x.shape[-1]}, is no pair of halves")
    check_tensor("x", x)
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    out = rows.new_empty(rows.shape[0], size)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(size, _BLOCK_SIZE))
        _silu_and_mul_kernel[grid](
            out, rows, rows.stride(0), size, BLOCK_SIZE=_BLOCK_SIZE, num_warps=4
        )
    return out.view(*x.shape[:-1], size)
