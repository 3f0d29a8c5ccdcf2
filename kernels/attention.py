"""The one place that picks an attention implementation for a batch."""

import torch
from torch import Tensor

from antiphon.kernels import reference
from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    features: AttentionFeatures,
) -> Tensor:
    """Attend from every new token of a packed batch to its request's context.

    Args:
        query: ``[num_tokens, num_q_heads, k_head_dim]``, decode requests first.
        k_cache: ``[num_blocks, block_size, num_kv_heads, k_head_dim]``, new tokens written.
        v_cache: ``[num_blocks, block_size, num_kv_heads, v_head_dim]``, new tokens written.
        batch: Where each request's tokens are.
        features: Of the layer.

    Returns:
        ``[num_tokens, num_q_heads, v_head_dim]``.
    """
    num_decode = batch.num_decode_requests
    if num_decode == len(batch.seq_lens):
        return reference.decode_attention(query, k_cache, v_cache, batch, features)
    prefill = reference.prefill_attention(query[num_decode:], k_cache, v_cache, batch, features)
    if num_decode == 0:
        return prefill
    decode = reference.decode_attention(query[:num_decode], k_cache, v_cache, batch, features)
    return torch.cat([decode, prefill])
