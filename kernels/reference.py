"""Torch implementations of the ops: the specification of the GPU kernels, and the CPU path.

Caches are ``[num_blocks, block_size, num_kv_heads, head_dim]``, one tensor per layer for K and one
for V. Contexts are gathered first, but for prompts whose blocks follow one another
(``context_reader``). Every request is one
call of scaled_dot_product_attention over exactly its own context; only decode requests with short
contexts are padded to one another, because there the calls would cost more than the padding.

Numerics: as ``reference_attend``.
"""

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures, DecodeGroup
from antiphon.kernels.context_reader import ContextReader, read_slots
from antiphon.kernels.paged_kv import PagedKV, Rotary, quantise
from antiphon.kernels.reference_attend import (
    Partial,
    attend,
    attend_partial,
    merge_partials,
)
from antiphon.kernels.reference_layers import add_rms_norm, rms_norm, silu_and_mul
from antiphon.kernels.reference_shared import shared_prefix_attention
from antiphon.kernels.reference_wire import gather_kv, scatter_kv
from antiphon.kernels.slot_rows import rows_of, slot_rows

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "gather_kv",
    "prefill_attention",
    "rms_norm",
    "scatter_kv",
    "shared_prefix_attention",
    "silu_and_mul",
    "write_kv",
]


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
        query: ``[num_tokens, num_q_heads, k_head_dim]``.
        key: ``[num_tokens, num_kv_heads, k_head_dim]``.
        value: ``[num_tokens, num_kv_heads, v_head_dim]``.
        kv: Written; quantised on the way if its dtype is.
        slot_mapping: ``[num_tokens]`` int64, unique; -1 writes nothing.
        rotary: None if queries and keys are rotated already, or not at all.

    Returns:
        The rotated queries, as ``query``; ``query`` itself without ``rotary``.
    """
    if rotary is not None:
        query, key = _rotate(query, rotary), _rotate(key, rotary)
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    _write(key, kv.keys, kv.key_scales, slot_mapping)
    _write(value, kv.values, kv.value_scales, slot_mapping)
    return query


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """In the order of transformers' own ``apply_rotary_pos_emb``: the same bits."""
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    rotary_dim = cos.shape[-1]
    turned = x[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), -1)


def _write(x: Tensor, cache: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    target, rows = slot_rows(cache), rows_of(slots, cache)
    if scales is None:
        target.index_copy_(0, rows, x.to(cache.dtype))
        return
    x, new_scales = quantise(x, cache.dtype)
    block_size = cache.shape[1]
    scales[slots // block_size, :, slots % block_size] = new_scales
    # index_copy_ knows no fp8; the bytes are the same
    target.view(torch.int8).index_copy_(0, rows, x.view(torch.int8))


def decode_attention(
    query: Tensor,
    kv: PagedKV,
    batch: AttentionBatch,
    features: AttentionFeatures,
) -> Tensor:
    """Attend from the one new token of each of the batch's decode requests.

    Args:
        query: ``[num_decode_requests, num_q_heads, k_head_dim]``.
        kv: The layer's cache, the new tokens already written.
        batch: Requests beyond ``num_decode_requests`` are ignored.
        features: Of the layer.

    Returns:
        ``[num_decode_requests, num_q_heads, v_head_dim]``.
    """
    num_requests, num_q_heads, head_dim = query.shape
    # The query heads of one KV head stand in as query rows: enable_gqa is several times slower.
    grouped = query.view(num_requests, 1, kv.num_kv_heads, -1, head_dim)
    reader = ContextReader(kv, batch, query.dtype)
    out = query.new_empty(num_requests, num_q_heads, kv.values.shape[3])
    rows = out.view(num_requests, kv.num_kv_heads, -1, out.shape[2])
    grouped_requests: set[int] = set()
    for group in batch.decode_groups:
        members = range(group.first, group.first + group.count)
        grouped_requests.update(members)
        rows[members.start : members.stop] = _attend_group(
            grouped[members.start : members.stop], kv, group, features
        )
    sharing = _attend_sharing(query, kv, batch, features, out)
    for index in range(num_requests):
        if index in grouped_requests or index in sharing:
            continue
        end = batch.seq_lens[index]
        keys, values = reader.read(index, features.first_visible(end - 1), end)
        rows[index] = attend(grouped[index], keys, values, features, None)[0]
    return out


def _attend_sharing(
    query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures, out: Tensor
) -> set[int]:
    """Write the rows of requests that share prefixes; returns which those are.

    A layer that sees only the newest tokens reads each context for itself: it reads little of it.
    """
    if not batch.shared_prefixes or features.is_limited:
        return set()
    prefix_out, prefix_lse = shared_prefix_attention(query, kv, batch, features)
    reader = ContextReader(kv, batch, torch.float32)
    grouped = query.view(query.shape[0], 1, kv.num_kv_heads, -1, query.shape[2]).float()
    members = [index for prefix in batch.shared_prefixes for index in prefix.members]
    own: list[Partial] = []
    for prefix in batch.shared_prefixes:
        for index in prefix.members:
            keys, values = reader.read(index, prefix.num_tokens, batch.seq_lens[index])
            own.append(attend_partial(grouped[index], keys, values, features, None))
    rows = torch.tensor(members, device=query.device)
    own_out = torch.cat([part for part, _ in own]).view(len(own), *out.shape[1:])
    own_lse = torch.cat([lse for _, lse in own]).view(len(own), -1)
    merged = merge_partials(
        (prefix_out[rows], prefix_lse[rows]), (own_out, own_lse), features.sinks
    )
    out[rows] = merged.to(out.dtype)
    return set(members)


def prefill_attention(
    query: Tensor,
    kv: PagedKV,
    batch: AttentionBatch,
    features: AttentionFeatures,
) -> Tensor:
    """Attend causally from the packed new tokens of the batch's other requests.

    Args:
        query: ``[num_tokens, num_q_heads, k_head_dim]``: the tokens of all requests after the
            decode requests, in order.
        kv: The layer's cache, the new tokens already written.
        batch: Its first ``num_decode_requests`` requests are ignored.
        features: Of the layer.

    Returns:
        ``[num_tokens, num_q_heads, v_head_dim]``.
    """
    out = query.new_empty(*query.shape[:2], kv.values.shape[3])
    group_size = query.shape[1] // kv.num_kv_heads
    first = batch.num_decode_requests
    offset = batch.cu_seqlens_q[first]
    reader = ContextReader(kv, batch, query.dtype)
    for index in range(first, len(batch.seq_lens)):
        rows = slice(batch.cu_seqlens_q[index] - offset, batch.cu_seqlens_q[index + 1] - offset)
        num_new, end = rows.stop - rows.start, batch.seq_lens[index]
        start = features.first_visible(end - num_new)
        keys, values = reader.read(index, start, end, group_size)
        mask = _causal_mask(range(end - num_new, end), range(start, end), features, query.device)
        attended = attend(query[rows].transpose(0, 1)[None], keys, values, features, mask)
        out[rows] = attended[0].transpose(0, 1)
    return out


def _attend_group(
    query: Tensor, kv: PagedKV, group: DecodeGroup, features: AttentionFeatures
) -> Tensor:
    """``[count, 1, H, G, D] -> [count, H, G, V]``."""
    shape = (group.count, -1, kv.num_kv_heads)
    keys = read_slots(kv.keys, kv.key_scales, group.slots, query.dtype)
    values = read_slots(kv.values, kv.value_scales, group.slots, query.dtype)
    keys, values = keys.view(*shape, keys.shape[-1]), values.view(*shape, values.shape[-1])
    positions = torch.arange(keys.shape[1], device=keys.device)[None]
    visible = positions <= group.last_positions
    if features.sliding_window is not None:
        visible &= positions > group.last_positions - features.sliding_window
    if features.chunk is not None:
        visible &= positions >= group.last_positions - group.last_positions % features.chunk
    return attend(
        query[:, 0],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        features,
        visible[:, None, None],
    )


def _causal_mask(
    queries: range, keys: range, features: AttentionFeatures, device: torch.device
) -> Tensor | str | None:
    """Who sees whom: None for everybody, "causal" for the plain square case, else a bool mask."""
    # The oldest visible position never moves back, so the last query's decides for all.
    unlimited = features.first_visible(queries.stop - 1) <= keys.start
    if unlimited and len(queries) == 1:
        return None
    if unlimited and len(queries) == len(keys):
        return "causal"
    query_positions = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key_positions = torch.arange(keys.start, keys.stop, device=device)[None, :]
    visible = key_positions <= query_positions
    if not unlimited:
        if features.sliding_window is not None:
            visible &= key_positions > query_positions - features.sliding_window
        if features.chunk is not None:
            visible &= key_positions >= query_positions - query_positions % features.chunk
    return visible
