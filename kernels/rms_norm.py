"""RMSNorm over the last dimension.

Parallelism: one program per token; a row fits one block.
Numerics:    statistics in float32; rounded before the scale as Llama does, or after it as Gemma.
Source:      Zhang & Sennrich 2019, arXiv:1910.07467.
"""

import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.checks import check_tensor

MAX_HIDDEN_SIZE = 65536


@triton.jit
def _rms_norm_kernel(
    out_ptr,  # [num_tokens, hidden_size]
    sum_ptr,  # [num_tokens, hidden_size] if RESIDUAL: x + residual
    x_ptr,  # [num_tokens, hidden_size]
    residual_ptr,  # [num_tokens, hidden_size] if RESIDUAL
    weight_ptr,  # [hidden_size]
    x_stride,
    residual_stride,
    hidden_size,
    eps,
    RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # power of two >= hidden_size
):
    # grid: (num_tokens,)
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride can pass 2**31
    columns = tl.arange(0, BLOCK_SIZE)
    inside = columns < hidden_size
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * hidden_size + columns, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / hidden_size + eps)
    if UNIT_OFFSET:
        y = (normed * (1.0 + weight.to(tl.float32))).to(dtype)
    else:
        y = (normed.to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row * hidden_size + columns, y, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Normalise each token's hidden state to unit RMS, then scale it.

    Args:
        x: ``[..., hidden_size]``, any float dtype; rows may be strided.
        weight: ``[hidden_size]``.
        eps: Added to the mean square.
        unit_offset: Scale by ``1 + weight``.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        ValueError: Shapes disagree, or ``hidden_size`` exceeds ``MAX_HIDDEN_SIZE``.
    """
    return _launch(x, None, weight, eps, unit_offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise the sum.

    Args:
        x: ``[..., hidden_size]``.
        residual: As ``x``.
        weight: ``[hidden_size]``.
        eps: Added to the mean square.

    Returns:
        The normalised sum, and the sum.

    Raises:
        ValueError: As ``rms_norm``.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    return _launch(x, residual, weight, eps, unit_offset=False)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    hidden_size = x.shape[-1]
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"x: hidden_size {hidden_size} exceeds {MAX_HIDDEN_SIZE}")
    check_tensor("x", x)
    check_tensor("weight", weight, (hidden_size,), device=x.device)
    rows = x.reshape(-1, hidden_size)
    residual_rows = rows if residual is None else residual.reshape(-1, hidden_size)
    out = rows.new_empty(rows.shape)
    total = out if residual is None else rows.new_empty(rows.shape)
    if rows.shape[0]:
        block_size = int(triton.next_power_of_2(hidden_size))
        _rms_norm_kernel[(rows.shape[0],)](
            out,
            total,
            rows,
            residual_rows,
            weight,
            rows.stride(0),
            residual_rows.stride(0),
            hidden_size,
            eps,
            RESIDUAL=residual is not None,
            UNIT_OFFSET=unit_offset,
            BLOCK_SIZE=block_size,
            num_warps=min(16, max(1, block_size // 512)),
        )
    return out.view(x.shape), total.view(x.shape)
