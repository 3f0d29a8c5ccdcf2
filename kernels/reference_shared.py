"""Torch twin of ``shared_prefix_attention``, and what the CPU's decode attention uses of it.

One gather of the prefix and one matrix product serve all members, and the exact result comes from
merging by log-sum-exp with what each member has to itself (Hydragen, arXiv:2402.05099).
"""

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.context_reader import ContextReader
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.reference_attend import Partial, attend_partial
from antiphon.kernels.shared_prefixes import SharedPrefix


def shared_prefix_attention(
    query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
) -> Partial:
    """Attend from decode requests to the prefixes that they share with others.

    Args:
        query: ``[num_decode_requests, num_q_heads, k_head_dim]``.
        kv: The layer's cache.
        batch: Whose ``shared_prefixes``.
        features: Of the layer; sinks are not for here but for the merge.

    Returns:
        ``[num_decode_requests, num_q_heads, v_head_dim]`` and its natural log-sum-exp
        ``[num_decode_requests, num_q_heads]``, float32; zeros and minus infinity for a request
        that shares nothing or no longer sees what it shares.
    """
    num_requests, num_q_heads, head_dim = query.shape
    shape = (num_requests, num_q_heads, kv.values.shape[3])
    out = torch.zeros(shape, dtype=torch.float32, device=query.device)
    lse = torch.full(shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
    reader = ContextReader(kv, batch, torch.float32)
    for prefix in batch.shared_prefixes:
        members = torch.tensor(prefix.members, device=query.device)
        keys, values = reader.read(prefix.members[0], 0, prefix.num_tokens)
        # [members, H, G, D] -> [1, H, members * G, D]
        grouped = query[members].view(len(members), kv.num_kv_heads, -1, head_dim)
        rows = grouped.transpose(0, 1).flatten(1, 2)[None].float()
        mask = _visible(prefix, batch, features, rows.shape[2] // len(members), query.device)
        part, part_lse = attend_partial(rows, keys, values, features, mask)
        by_member = (kv.num_kv_heads, len(members), -1)
        out[members] = part.view(*by_member, shape[2]).transpose(0, 1).flatten(1, 2)
        lse[members] = part_lse.view(by_member).transpose(0, 1).flatten(1, 2)
    return out, lse


def _visible(
    prefix: SharedPrefix,
    batch: AttentionBatch,
    features: AttentionFeatures,
    group_size: int,
    device: torch.device,
) -> Tensor | None:
    """``[members * group_size, num_tokens]``, or None where everybody sees everything."""
    first = [features.first_visible(batch.seq_lens[member] - 1) for member in prefix.members]
    if not any(first):
        return None
    by_row = torch.tensor(first, device=device).repeat_interleave(group_size)
    return torch.arange(prefix.num_tokens, device=device)[None] >= by_row[:, None]
