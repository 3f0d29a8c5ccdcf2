"""The inner loop of every attention kernel: online softmax of some query rows over a range of keys.

Numerics: scores, softmax and accumulation in float32, base 2; products in the query's dtype, for
float32 without TF32. Quantised keys enter the product as they are and their scales multiply the
scores; the scales of values multiply the weights.
Source:   Dao 2023, arXiv:2307.08691 (the loop); Kwon et al. 2023, arXiv:2309.06180 (the pages).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The oldest position that a token sees; see ``AttentionFeatures.first_visible``."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, position - position % CHUNK)
    return first


@triton.jit
def cap_scores(scores, SOFT_CAP: tl.constexpr):
    """``SOFT_CAP * tanh(scores / SOFT_CAP)``; the interpreter has no tanh."""
    if SOFT_CAP > 0:
        twice = 2.0 * tl.abs(scores) / SOFT_CAP
        decayed = tl.exp(-twice)  # in (0, 1]: no overflow
        capped = SOFT_CAP * (1.0 - decayed) / (1.0 + decayed)
        scores = tl.where(scores < 0, -capped, capped)
    return scores


@triton.jit
def load_heads(
    cache_ptr,
    slots,
    kv_head,
    in_range,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``[len(slots), PADDED]`` of one head; zeros beyond DIM and outside the range."""
    dims = tl.arange(0, PADDED)
    pointers = cache_ptr + slots[:, None] * (HEADS * DIM) + kv_head * DIM + dims[None, :]
    if DIM != PADDED:
        if MASKED:
            return tl.load(pointers, mask=in_range[:, None] & (dims[None, :] < DIM), other=0.0)
        return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=in_range[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def attend_range(
    acc,  # [M, V_PAD] float32
    top,  # [M] float32: running maximum, base 2
    total,  # [M] float32: running sum
    query,  # [M, K_PAD]
    k_ptr,  # [num_blocks, PAGE, HEADS, K_DIM]
    v_ptr,  # [num_blocks, PAGE, HEADS, V_DIM]
    k_scales_ptr,  # [num_blocks, HEADS, PAGE] if SCALED
    v_scales_ptr,
    table_ptr,  # [max_blocks] int32, of the request
    kv_head,
    start,
    stop,
    positions,  # [M], of the query rows
    scale,
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
    MASKED: tl.constexpr,  # else every row sees every key, and the range is whole tiles
    STAGES: tl.constexpr,
):
    """Take keys ``[start, stop)`` into the running softmax; returns ``acc, top, total``."""
    offsets = tl.arange(0, BLOCK_N)
    first = first_visible(positions, WINDOW, CHUNK)
    for tile in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keys_at = tile + offsets
        in_range = keys_at < stop
        if MASKED:
            blocks = tl.load(table_ptr + keys_at // PAGE, mask=in_range, other=0)
        else:
            blocks = tl.load(table_ptr + keys_at // PAGE)
        slots = blocks.to(tl.int64) * PAGE + keys_at % PAGE
        keys = load_heads(k_ptr, slots, kv_head, in_range, HEADS, K_DIM, K_PAD, MASKED)
        scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * scale
        scale_at = blocks.to(tl.int64) * (HEADS * PAGE) + kv_head * PAGE + keys_at % PAGE
        if SCALED:
            scores *= tl.load(k_scales_ptr + scale_at, mask=in_range, other=0.0)[None, :]
        scores = cap_scores(scores, SOFT_CAP) * LOG2_E
        if MASKED:
            visible = in_range[None, :] & (keys_at[None, :] <= positions[:, None])
            if WINDOW > 0 or CHUNK > 0:
                visible &= keys_at[None, :] >= first[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet: keep its weights 0 instead of inf - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(v_scales_ptr + scale_at, mask=in_range, other=0.0)[None, :]
        values = load_heads(v_ptr, slots, kv_head, in_range, HEADS, V_DIM, V_PAD, MASKED)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(query.dtype), values.to(query.dtype), acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def store_partial(
    partial_ptr, lse_ptr, rows, exists, acc, top, total, V_DIM: tl.constexpr, V_PAD: tl.constexpr
):
    """Write what a part of a context amounts to: its output and log-sum-exp, base 2, per row."""
    columns = tl.arange(0, V_PAD)
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    tl.store(
        partial_ptr + rows[:, None] * V_DIM + columns[None, :],
        acc / safe[:, None],
        mask=exists[:, None] & (columns[None, :] < V_DIM),
    )
    lse = tl.where(empty, float("-inf"), top + tl.log2(safe))
    tl.store(lse_ptr + rows, lse, mask=exists)
