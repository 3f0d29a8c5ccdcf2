"""Rotary embedding and the write of new keys and values to the cache, in one pass.

Parallelism: one program per token and head: query heads first, then KV heads, which write both K
             and V.
Numerics:    rotation and quantisation in float32; int8 rounds half to even, by adding and taking
             away 1.5 * 2**23, because a cast truncates.
Source:      Su et al. 2021, arXiv:2104.09864 (RoPE), in the half-rotation order of GPT-NeoX.
"""

import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.checks import check_tensor
from antiphon.kernels.launch import padded_dim, scales_of
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, Rotary

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 has no fraction bits there


@triton.jit
def load_rotated(
    x_ptr, cos_ptr, sin_ptr, DIM: tl.constexpr, PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr
):
    """``[PADDED]`` float32 of one head, its first ROTARY_DIM elements rotated."""
    dims = tl.arange(0, PADDED)
    x = tl.load(x_ptr + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        turned = dims < ROTARY_DIM
        partner = tl.where(dims < half, dims + half, dims - half)
        other = tl.load(x_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + dims, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + dims, mask=turned, other=0.0).to(tl.float32)
        x = x * cos + tl.where(dims < half, -other, other) * sin
    return x


@triton.jit
def quantise(x, scale, LIMIT: tl.constexpr, ROUNDS: tl.constexpr):
    """Elements in float32, ready for the cast, of rows whose scale is ``max|x| / LIMIT``."""
    elements = x / tl.maximum(scale, 1.1754943508222875e-38)
    elements = tl.minimum(tl.maximum(elements, -LIMIT), LIMIT)
    if ROUNDS:
        elements = (elements + ROUNDER) - ROUNDER
    return elements


@triton.jit
def _write_kv_kernel(
    out_ptr,  # [num_tokens, num_q_heads, K_DIM], if ROTARY_DIM
    query_ptr,  # [num_tokens, num_q_heads, K_DIM]
    key_ptr,  # [num_tokens, HEADS, K_DIM]
    value_ptr,  # [num_tokens, HEADS, V_DIM]
    k_ptr,  # [num_blocks, PAGE, HEADS, K_DIM]
    v_ptr,  # [num_blocks, PAGE, HEADS, V_DIM]
    k_scales_ptr,  # [num_blocks, HEADS, PAGE] if LIMIT
    v_scales_ptr,
    cos_ptr,  # [num_tokens, ROTARY_DIM]
    sin_ptr,
    slots_ptr,  # [num_tokens] int64
    query_stride,
    key_stride,
    value_stride,
    rotary_stride,
    Q_HEADS: tl.constexpr,  # 0 without rotation: queries stay as they are
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    LIMIT: tl.constexpr,  # 0.0: not quantised
    ROUNDS: tl.constexpr,
):
    # grid: (num_tokens, Q_HEADS + HEADS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos_at, sin_at = cos_ptr + token * rotary_stride, sin_ptr + token * rotary_stride
    columns = tl.arange(0, K_PAD)
    if head < Q_HEADS:
        query_at = query_ptr + token * query_stride + head * K_DIM
        query = load_rotated(query_at, cos_at, sin_at, K_DIM, K_PAD, ROTARY_DIM)
        tl.store(
            out_ptr + (token * Q_HEADS + head) * K_DIM + columns,
            query.to(out_ptr.dtype.element_ty),
            mask=columns < K_DIM,
        )
    else:
        head -= Q_HEADS
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            key_at = key_ptr + token * key_stride + head * K_DIM
            key = load_rotated(key_at, cos_at, sin_at, K_DIM, K_PAD, ROTARY_DIM)
            value_at = value_ptr + token * value_stride + head * V_DIM
            value = load_rotated(value_at, cos_at, sin_at, V_DIM, V_PAD, 0)
            if LIMIT > 0:
                # The scale belongs to the key as the model's dtype holds it.
                key = key.to(key_ptr.dtype.element_ty).to(tl.float32)
                key_scale = tl.max(tl.abs(key), 0) / LIMIT
                key = quantise(key, key_scale, LIMIT, ROUNDS)
                value_scale = tl.max(tl.abs(value), 0) / LIMIT
                value = quantise(value, value_scale, LIMIT, ROUNDS)
                scale_at = (slot // PAGE * HEADS + head) * PAGE + slot % PAGE
                tl.store(k_scales_ptr + scale_at, key_scale)
                tl.store(v_scales_ptr + scale_at, value_scale)
            value_columns = tl.arange(0, V_PAD)
            tl.store(
                k_ptr + (slot * HEADS + head) * K_DIM + columns,
                key.to(k_ptr.dtype.element_ty),
                mask=columns < K_DIM,
            )
            tl.store(
                v_ptr + (slot * HEADS + head) * V_DIM + value_columns,
                value.to(v_ptr.dtype.element_ty),
                mask=value_columns < V_DIM,
            )


def write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: PagedKV,
    slot_mapping: Tensor,
    rotary: Rotary | None = None,
) -> Tensor:
    """Rotate queries and keys, and write keys and values to their cache slots.

    Args:
        query: ``[num_tokens, num_q_heads, k_head_dim]``; tokens may be strided.
        key: ``[num_tokens, num_kv_heads, k_head_dim]``; tokens may be strided.
        value: ``[num_tokens, num_kv_heads, v_head_dim]``; tokens may be strided.
        kv: Written; quantised on the way if its dtype is.
        slot_mapping: ``[num_tokens]`` int64, unique; -1 writes nothing.
        rotary: None if queries and keys are rotated already, or not at all.

    Returns:
        The rotated queries in a new tensor; ``query`` itself without ``rotary``.

    Raises:
        ValueError: Shapes disagree.
    """
    num_tokens, num_q_heads, k_dim = query.shape
    v_dim = value.shape[2]
    check_tensor("kv.keys", kv.keys, (*kv.keys.shape[:3], k_dim), device=query.device)
    check_tensor("kv.values", kv.values, (*kv.keys.shape[:3], v_dim), device=query.device)
    check_tensor("key", key, (num_tokens, kv.num_kv_heads, k_dim))
    check_tensor("value", value, (num_tokens, kv.num_kv_heads, v_dim))
    check_tensor("slot_mapping", slot_mapping, (num_tokens,))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(1) != x.shape[2]:
            raise ValueError(f"{name}: the heads of a token must be contiguous")
    rotary_dim = 0 if rotary is None else rotary.cos.shape[1]
    out = query if rotary is None else query.new_empty(query.shape)
    num_rotated = 0 if rotary is None else num_q_heads
    cos, sin = (query, query) if rotary is None else (rotary.cos, rotary.sin)
    if rotary is not None:
        check_tensor("rotary.cos", cos, (num_tokens, rotary_dim))
        check_tensor("rotary.sin", sin, (num_tokens, rotary_dim))
    if num_tokens == 0:
        return out
    limit = QUANTISED_LIMITS.get(kv.keys.dtype, 0.0)
    _write_kv_kernel[(num_tokens, num_rotated + kv.num_kv_heads)](
        out,
        query,
        key,
        value,
        kv.keys,
        kv.values,
        *scales_of(kv),
        cos,
        sin,
        slot_mapping,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        cos.stride(0),
        Q_HEADS=num_rotated,
        HEADS=kv.num_kv_heads,
        K_DIM=k_dim,
        K_PAD=padded_dim(k_dim),
        V_DIM=v_dim,
        V_PAD=padded_dim(v_dim),
        PAGE=kv.block_size,
        ROTARY_DIM=rotary_dim,
        LIMIT=limit,
        ROUNDS=limit > 0 and not kv.keys.dtype.is_floating_point,
        num_warps=1,
    )
    return out
