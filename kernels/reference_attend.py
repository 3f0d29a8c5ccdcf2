"""Attention of some query rows to some keys in torch: the inner part of the reference ops.

Numerics: softmax in the dtype's own SDPA kernel; soft cap, sinks and partial results in float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from antiphon.kernels.attention_batch import AttentionFeatures

Partial = tuple[Tensor, Tensor]
"""Output and log-sum-exp of attention to some of the keys, float32."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    features: AttentionFeatures,
    mask: Tensor | str | None,
) -> Tensor:
    """``[B, H, M, D] x [B, H, N, D] x [B, H, N, V] -> [B, H, M, V]``; ``mask`` may be "causal"."""
    if features.soft_cap is not None or features.sinks is not None:
        return _attend_with_scores(query, keys, values, features, mask)
    if isinstance(mask, str):
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=features.scale
        )
    return scaled_dot_product_attention(query, keys, values, mask, scale=features.scale)


def attend_partial(
    query: Tensor, keys: Tensor, values: Tensor, features: AttentionFeatures, mask: Tensor | None
) -> Partial:
    """As ``attend``, without sinks, with the log-sum-exp ``[B, H, M]`` to merge the result by.

    A row that sees nothing gets zeros and minus infinity.
    """
    scores = _scores(query, keys, features)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    # The largest weight is exp(top - lse). logsumexp itself takes twice as long as all the rest.
    top = scores.amax(-1)
    lse = top - weights.amax(-1).log()
    if mask is not None:
        weights = weights.nan_to_num(0.0)
        lse = torch.where(top.isneginf(), top, lse)
    return weights @ values.float(), lse


def merge_partials(first: Partial, second: Partial, sinks: Tensor | None) -> Tensor:
    """Attention to the keys of both, and to the sinks ``[num_q_heads]``.

    Args:
        first: ``[..., num_q_heads, V]`` and ``[..., num_q_heads]``.
        second: As ``first``.
        sinks: Logits that take part in the softmax only.
    """
    logits = [first[1], second[1]]
    if sinks is not None:
        logits.append(sinks.float().expand_as(first[1]))
    weights = torch.stack(logits).softmax(0)
    return first[0] * weights[0][..., None] + second[0] * weights[1][..., None]


def _scores(query: Tensor, keys: Tensor, features: AttentionFeatures) -> Tensor:
    scores = (query @ keys.transpose(-1, -2)).float() * features.scale
    if features.soft_cap is not None:
        scores = torch.tanh(scores / features.soft_cap) * features.soft_cap
    return scores


def _attend_with_scores(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    features: AttentionFeatures,
    mask: Tensor | str | None,
) -> Tensor:
    scores = _scores(query, keys, features)
    if isinstance(mask, str):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if features.sinks is not None:
        # In decode the rows of a head are its group of query heads, each with its own sink.
        sinks = features.sinks.float().view(1, scores.shape[1], -1, 1)
        sinks = sinks.expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(values.dtype) @ values
