"""Causal attention of packed prompts over paged KV, earlier context included.

Parallelism: one program per tile of query rows and query head; a tile's heads are neighbours, so
             heads of one KV head find its keys in L2. Keys that no row sees are never loaded; keys
             that every row sees are attended without a mask.
Numerics:    as ``attention_tile``.
Source:      Dao 2023, arXiv:2307.08691; sinks as in Xiao et al. 2023, arXiv:2309.17453.
"""

import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.attention_tile import LOG2_E, attend_range, first_visible
from antiphon.kernels.launch import attention_constants, check_attention, scales_of
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.tuning import PrefillConfig


# Numbers that change with the batch: a kernel for those that are 1 or multiples of 16 would gain
# nothing, and be compiled while requests wait.
@triton.jit(do_not_specialize=["num_skipped", "table_stride"])
def _prefill_attention_kernel(
    out_ptr,  # [num_tokens, num_q_heads, V_DIM]
    query_ptr,  # [num_tokens, num_q_heads, K_DIM]
    k_ptr,  # [num_blocks, PAGE, HEADS, K_DIM]
    v_ptr,  # [num_blocks, PAGE, HEADS, V_DIM]
    k_scales_ptr,  # [num_blocks, HEADS, PAGE] if SCALED
    v_scales_ptr,
    sinks_ptr,  # [num_q_heads] if SINKS
    tables_ptr,  # [num_requests, table_stride] int32
    tiles_ptr,  # [num_tiles, 2] int32: request, first new token
    cu_seqlens_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,  # [num_requests] int32
    scale,
    num_skipped,  # tokens of the decode requests, which query and out do not hold
    table_stride,
    query_stride,
    out_stride,
    Q_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SINKS: tl.constexpr,
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
    # grid: (num_tiles * num_q_heads,)
    tile, head = tl.program_id(0) // Q_HEADS, tl.program_id(0) % Q_HEADS
    kv_head = head // (Q_HEADS // HEADS)
    request = tl.load(tiles_ptr + tile * 2).to(tl.int64)
    first_row = tl.load(tiles_ptr + tile * 2 + 1)
    first_token = tl.load(cu_seqlens_ptr + request)
    num_new = tl.load(cu_seqlens_ptr + request + 1) - first_token
    context = tl.load(seq_lens_ptr + request) - num_new
    table_ptr = tables_ptr + request * table_stride

    rows = first_row + tl.arange(0, BLOCK_M)
    exists = rows < num_new
    tokens = (first_token - num_skipped + rows).to(tl.int64)
    dims = tl.arange(0, K_PAD)
    query = tl.load(
        query_ptr + tokens[:, None] * query_stride + head * K_DIM + dims[None, :],
        mask=exists[:, None] & (dims[None, :] < K_DIM),
        other=0.0,
    )
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        top = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)

    positions = context + rows
    stop = context + tl.minimum(first_row + BLOCK_M, num_new)
    start = first_visible(context + first_row, WINDOW, CHUNK) // BLOCK_N * BLOCK_N
    if WINDOW == 0 and CHUNK == 0:
        edge = (context + first_row + 1) // BLOCK_N * BLOCK_N
        acc, top, total = attend_range(
            acc, top, total, query, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr, kv_head,
            start, edge, positions, scale, WINDOW, CHUNK, SOFT_CAP, SCALED, HEADS, K_DIM, K_PAD,
            V_DIM, V_PAD, PAGE, BLOCK_N, False, STAGES,
        )  # fmt: skip
        start = edge
    acc, top, total = attend_range(
        acc, top, total, query, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr, kv_head,
        start, stop, positions, scale, WINDOW, CHUNK, SOFT_CAP, SCALED, HEADS, K_DIM, K_PAD,
        V_DIM, V_PAD, PAGE, BLOCK_N, True, STAGES,
    )  # fmt: skip

    total = tl.where(exists, total, 1.0)  # rows behind the last token may see no key
    columns = tl.arange(0, V_PAD)
    tl.store(
        out_ptr + tokens[:, None] * out_stride + head * V_DIM + columns[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (columns[None, :] < V_DIM),
    )


def prefill_attention(
    query: Tensor,
    kv: PagedKV,
    batch: AttentionBatch,
    features: AttentionFeatures,
    config: PrefillConfig,
) -> Tensor:
    """Attend causally from the packed new tokens of the batch's other requests.

    Args:
        query: ``[num_tokens, num_q_heads, k_head_dim]``: the tokens of all requests after the
            decode requests, in order.
        kv: The layer's cache, the new tokens already written.
        batch: With a plan made for ``config.block_m``; its decode requests are ignored.
        features: Of the layer.
        config: From the table.

    Returns:
        ``[num_tokens, num_q_heads, v_head_dim]``.

    Raises:
        ValueError: Shapes disagree, or the plan is missing or of another tile size.
    """
    plan = check_attention(query, kv, batch, features)
    if plan.prefill is None or plan.prefill.block_m != config.block_m:
        raise ValueError(f"batch: has no prefill plan for tiles of {config.block_m} rows")
    num_tokens, num_q_heads, _ = query.shape
    out = query.new_empty(num_tokens, num_q_heads, kv.values.shape[3])
    num_tiles = plan.prefill.tiles.shape[0]
    if num_tiles == 0:
        return out
    _prefill_attention_kernel[(num_tiles * num_q_heads,)](
        out,
        query,
        kv.keys,
        kv.values,
        *scales_of(kv),
        query if features.sinks is None else features.sinks,
        batch.block_tables,
        plan.prefill.tiles,
        plan.cu_seqlens_q,
        plan.seq_lens,
        features.scale,
        batch.num_decode_requests,
        batch.block_tables.stride(0),
        query.stride(0),
        out.stride(0),
        Q_HEADS=num_q_heads,
        BLOCK_M=config.block_m,
        SINKS=features.sinks is not None,
        **attention_constants(kv, features),
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
