"""Attention of a group of decode requests over the prefix that their block tables have in common.

The queries of all members form the rows of one matrix product, so the prefix is read once for the
group and not once for each member. The result is partial: ``decode_attention`` merges it with each
member's own suffix by log-sum-exp, which is exact.

Parallelism: one program per shared item (some members, a part of the prefix) and KV head.
Numerics:    as ``attention_tile``.
Source:      Juravsky et al. 2024, arXiv:2402.05099 (Hydragen).
"""

import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures, DecodePlan
from antiphon.kernels.attention_tile import attend_range, first_visible, store_partial
from antiphon.kernels.launch import attention_constants, check_attention, scales_of
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.tuning import PrefillConfig


@triton.jit(do_not_specialize=["table_stride"])  # see prefill_attention
def _shared_prefix_attention_kernel(
    partial_ptr,  # [num_rows, Q_LEN, num_q_heads, V_DIM] float32
    lse_ptr,  # [num_rows, Q_LEN, num_q_heads] float32
    query_ptr,  # [num_requests * Q_LEN, num_q_heads, K_DIM]
    k_ptr,  # [num_blocks, PAGE, HEADS, K_DIM]
    v_ptr,  # [num_blocks, PAGE, HEADS, V_DIM]
    k_scales_ptr,  # [num_blocks, HEADS, PAGE] if SCALED
    v_scales_ptr,
    tables_ptr,  # [num_requests, table_stride] int32
    items_ptr,  # [num_items, 5] int32: members [first, stop), part, number of parts, prefix length
    members_ptr,  # [num_requests] int32
    offsets_ptr,  # [num_requests + 1] int32: first workspace row of each request
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
    item_ptr = items_ptr + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    first_member, stop_member = tl.load(item_ptr), tl.load(item_ptr + 1)
    if first_member == stop_member:
        return
    part, num_parts, prefix_len = (
        tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4),
    )  # fmt: skip

    rows = tl.arange(0, BLOCK_M)
    at = first_member + rows // (GROUP * Q_LEN)
    exists = at < stop_member
    requests = tl.load(members_ptr + at, mask=exists, other=0).to(tl.int64)
    leader = tl.load(members_ptr + first_member).to(tl.int64)
    token, head = rows // GROUP % Q_LEN, kv_head * GROUP + rows % GROUP
    ends = tl.load(seq_lens_ptr + requests, mask=exists, other=0)
    positions = ends - Q_LEN + token
    dims = tl.arange(0, K_PAD)
    queries_at = (requests * Q_LEN + token) * query_stride + head * K_DIM
    query = tl.load(
        query_ptr + queries_at[:, None] + dims[None, :],
        mask=exists[:, None] & (dims[None, :] < K_DIM),
        other=0.0,
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)

    # A part is a place in the prefix that some member still sees.
    oldest = tl.where(exists, first_visible(positions, WINDOW, CHUNK), prefix_len)
    begin = tl.minimum(tl.min(oldest, 0), prefix_len) // BLOCK_N * BLOCK_N
    per_part = tl.cdiv(tl.cdiv(prefix_len - begin, num_parts), BLOCK_N) * BLOCK_N
    start = begin + part * per_part
    stop = tl.minimum(start + per_part, prefix_len)
    acc, top, total = attend_range(
        acc, top, total, query, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr,
        tables_ptr + leader * table_stride, kv_head, start, stop, positions, scale, WINDOW, CHUNK,
        SOFT_CAP, SCALED, HEADS, K_DIM, K_PAD, V_DIM, V_PAD, PAGE, BLOCK_N, True, STAGES,
    )  # fmt: skip
    row = tl.load(offsets_ptr + requests, mask=exists, other=0).to(tl.int64) + part
    at_row = (row * Q_LEN + token) * (HEADS * GROUP) + head
    store_partial(partial_ptr, lse_ptr, at_row, exists, acc, top, total, V_DIM, V_PAD)


def shared_prefix_attention(
    query: Tensor,
    kv: PagedKV,
    batch: AttentionBatch,
    features: AttentionFeatures,
    config: PrefillConfig,
    workspace: tuple[Tensor, Tensor],
) -> None:
    """Attend to the shared prefixes of a decode plan, into its workspace.

    Args:
        query: ``[num_decode_requests * q_len, num_q_heads, k_head_dim]``.
        kv: The layer's cache.
        batch: With a decode plan.
        features: Of the layer; sinks are not for here but for the merge.
        config: From the table; ``block_m`` bounds the query rows of a program.
        workspace: Partial outputs ``[num_rows, q_len, num_q_heads, v_head_dim]`` and their
            log-sum-exp, base 2, ``[num_rows, q_len, num_q_heads]``; float32, the first rows of each
            member written.

    Raises:
        ValueError: Shapes disagree, or the members of an item are more than ``block_m`` rows.
    """
    plan = _decode_plan(query, kv, batch, features)
    num_q_heads = query.shape[1]
    q_len = query.shape[0] // batch.num_decode_requests
    group = num_q_heads // kv.num_kv_heads
    block_m = max(16, int(triton.next_power_of_2(plan.members_per_item * group * q_len)))
    if plan.members_per_item > 1 and block_m > max(16, config.block_m):
        raise ValueError(
            f"batch: {plan.members_per_item} members of {group * q_len} rows exceed the tile of "
            f"{config.block_m}"
        )
    tensors = batch.plan
    assert tensors is not None
    _shared_prefix_attention_kernel[(plan.shared_items.shape[0], kv.num_kv_heads)](
        *workspace,
        query,
        kv.keys,
        kv.values,
        *scales_of(kv),
        batch.block_tables,
        plan.shared_items,
        plan.members,
        plan.part_offsets,
        tensors.seq_lens,
        features.scale,
        batch.block_tables.stride(0),
        query.stride(0),
        GROUP=group,
        Q_LEN=q_len,
        BLOCK_M=block_m,
        **attention_constants(kv, features),
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _decode_plan(
    query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
) -> DecodePlan:
    plan = check_attention(query, kv, batch, features).decode
    if plan is None:
        raise ValueError("batch: has no decode plan")
    return plan
