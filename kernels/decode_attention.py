"""Attention of decode requests over paged KV: split along the context, then merged.

Parallelism: one program per work item (a part of one request's context) and KV head, whose query
             heads share its loads; then one program per token and head that merges the parts. The
             items are the plan's: see ``decode_plan``.
Numerics:    as ``attention_tile``; parts are merged by log-sum-exp in float32.
Source:      Dao et al. 2023, "Flash-Decoding for long-context inference" (the split); Ye et al.
             2025, arXiv:2501.01005 (planning ragged batches for a fixed grid).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.attention_tile import LOG2_E, attend_range, first_visible, store_partial
from antiphon.kernels.launch import attention_constants, check_attention, padded_dim, scales_of
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.shared_prefix_attention import shared_prefix_attention
from antiphon.kernels.tuning import DecodeConfig, PrefillConfig


@triton.jit(do_not_specialize=["table_stride"])  # see prefill_attention
def _decode_attention_kernel(
    partial_ptr,  # [num_rows, Q_LEN, num_q_heads, V_DIM] float32
    lse_ptr,  # [num_rows, Q_LEN, num_q_heads] float32
    query_ptr,  # [num_requests * Q_LEN, num_q_heads, K_DIM]
    k_ptr,  # [num_blocks, PAGE, HEADS, K_DIM]
    v_ptr,  # [num_blocks, PAGE, HEADS, V_DIM]
    k_scales_ptr,  # [num_blocks, HEADS, PAGE] if SCALED
    v_scales_ptr,
    tables_ptr,  # [num_requests, table_stride] int32
    items_ptr,  # [num_items, 4] int32: request, part, number of parts, workspace row
    prefix_lens_ptr,  # [num_requests] int32
    seq_lens_ptr,  # [num_requests] int32
    scale,
    table_stride,
    query_stride,
    GROUP: tl.constexpr,  # query heads of a KV head
    Q_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: (num_items, HEADS)
    item_ptr = items_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    request = tl.load(item_ptr).to(tl.int64)
    if request < 0:
        return
    part, num_parts = tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    row = tl.load(item_ptr + 3).to(tl.int64)
    end = tl.load(seq_lens_ptr + request)

    rows = tl.arange(0, BLOCK_M)
    exists = rows < GROUP * Q_LEN
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    positions = end - Q_LEN + token
    dims = tl.arange(0, K_PAD)
    queries_at = (request * Q_LEN + token) * query_stride + head * K_DIM
    query = tl.load(
        query_ptr + queries_at[:, None] + dims[None, :],
        mask=exists[:, None] & (dims[None, :] < K_DIM),
        other=0.0,
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)

    # A part is a place among the tokens that this layer sees behind the shared prefix.
    prefix_len = tl.load(prefix_lens_ptr + request)
    begin = tl.maximum(prefix_len, first_visible(end - Q_LEN, WINDOW, CHUNK))
    per_part = tl.cdiv(tl.cdiv(end - begin, num_parts), BLOCK_N) * BLOCK_N
    start = begin + part * per_part
    stop = tl.minimum(start + per_part, end)
    acc, top, total = attend_range(
        acc, top, total, query, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr,
        tables_ptr + request * table_stride, kv_head, start, stop, positions, scale, WINDOW, CHUNK,
        SOFT_CAP, SCALED, HEADS, K_DIM, K_PAD, V_DIM, V_PAD, PAGE, BLOCK_N, True, STAGES,
    )  # fmt: skip
    at_row = (row * Q_LEN + token) * (HEADS * GROUP) + head
    store_partial(partial_ptr, lse_ptr, at_row, exists, acc, top, total, V_DIM, V_PAD)


@triton.jit
def _merge_parts_kernel(
    out_ptr,  # [num_requests * Q_LEN, num_q_heads, V_DIM]
    partial_ptr,  # [num_rows, Q_LEN, num_q_heads, V_DIM] float32
    lse_ptr,  # [num_rows, Q_LEN, num_q_heads] float32
    offsets_ptr,  # [num_requests + 1] int32
    sinks_ptr,  # [num_q_heads] if SINKS
    Q_LEN: tl.constexpr,
    Q_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):
    # grid: (num_requests * Q_LEN, num_q_heads)
    token, head = tl.program_id(0), tl.program_id(1)
    request = token // Q_LEN
    columns = tl.arange(0, V_PAD)
    acc = tl.zeros([V_PAD], tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = top * 0.0 + 1.0
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    first_row = tl.load(offsets_ptr + request).to(tl.int64)
    num_parts = tl.load(offsets_ptr + request + 1) - first_row
    for part in tl.range(0, num_parts):
        at = ((first_row + part) * Q_LEN + token % Q_LEN) * Q_HEADS + head
        lse = tl.load(lse_ptr + at)
        partial = tl.load(partial_ptr + at * V_DIM + columns, mask=columns < V_DIM, other=0.0)
        new_top = tl.maximum(top, lse)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, shrink = tl.exp2(lse - base), tl.exp2(top - base)
        acc = acc * shrink + partial * weight
        total = total * shrink + weight
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)  # a request that only fills a graph
    out_at = (token.to(tl.int64) * Q_HEADS + head) * V_DIM
    tl.store(
        out_ptr + out_at + columns,
        (acc / total).to(out_ptr.dtype.element_ty),
        mask=columns < V_DIM,
    )


def decode_attention(
    query: Tensor,
    kv: PagedKV,
    batch: AttentionBatch,
    features: AttentionFeatures,
    config: DecodeConfig,
    shared_config: PrefillConfig,
) -> Tensor:
    """Attend from the newest tokens of each of the batch's decode requests.

    Args:
        query: ``[num_decode_requests * q_len, num_q_heads, k_head_dim]``: the last ``q_len`` tokens
            of each context, one unless tokens were speculated.
        kv: The layer's cache, the new tokens already written.
        batch: With a decode plan; requests beyond ``num_decode_requests`` are ignored.
        features: Of the layer.
        config: From the table.
        shared_config: From the table, for the prefixes that the plan shares.

    Returns:
        ``[num_decode_requests * q_len, num_q_heads, v_head_dim]``; zeros for an empty context.

    Raises:
        ValueError: Shapes disagree, or the plan is missing.
    """
    tensors = check_attention(query, kv, batch, features)
    plan = tensors.decode
    num_requests = batch.num_decode_requests
    if plan is None or plan.part_offsets.shape[0] != num_requests + 1:
        raise ValueError(f"batch: has no decode plan for {num_requests} requests")
    if query.shape[0] % num_requests:
        raise ValueError(f"query: {query.shape[0]} tokens are not divisible by {num_requests}")
    num_q_heads, v_dim = query.shape[1], kv.values.shape[3]
    q_len, group = query.shape[0] // num_requests, num_q_heads // kv.num_kv_heads
    partial = query.new_empty((plan.num_rows, q_len, num_q_heads, v_dim), dtype=torch.float32)
    lse = query.new_empty((plan.num_rows, q_len, num_q_heads), dtype=torch.float32)
    shared_prefix_attention(query, kv, batch, features, shared_config, (partial, lse))
    _decode_attention_kernel[(plan.items.shape[0], kv.num_kv_heads)](
        partial,
        lse,
        query,
        kv.keys,
        kv.values,
        *scales_of(kv),
        batch.block_tables,
        plan.items,
        plan.prefix_lens,
        tensors.seq_lens,
        features.scale,
        batch.block_tables.stride(0),
        query.stride(0),
        GROUP=group,
        Q_LEN=q_len,
        BLOCK_M=max(16, int(triton.next_power_of_2(group * q_len))),
        **attention_constants(kv, features),
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    out = query.new_empty(query.shape[0], num_q_heads, v_dim)
    _merge_parts_kernel[(query.shape[0], num_q_heads)](
        out,
        partial,
        lse,
        plan.part_offsets,
        query if features.sinks is None else features.sinks,
        Q_LEN=q_len,
        Q_HEADS=num_q_heads,
        V_DIM=v_dim,
        V_PAD=padded_dim(v_dim),
        SINKS=features.sinks is not None,
        num_warps=1,
    )
    return out
