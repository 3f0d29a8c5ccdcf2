"""What the launchers of the attention kernels have in common."""

from typing import Any

import triton
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures, KernelPlan
from antiphon.kernels.checks import check_tensor
from antiphon.kernels.paged_kv import PagedKV


def check_attention(
    query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
) -> KernelPlan:
    """Check what every attention op is given, and return the batch's plan.

    Raises:
        ValueError: Names the argument that does not fit.
    """
    if batch.plan is None:
        raise ValueError("batch: has no plan; it was made for the torch ops")
    num_q_heads, head_dim = query.shape[1:]
    check_tensor("kv.keys", kv.keys, (*kv.keys.shape[:3], head_dim), device=query.device)
    check_tensor("kv.values", kv.values, (*kv.keys.shape[:3], kv.values.shape[3]))
    if not kv.keys.is_contiguous() or not kv.values.is_contiguous():
        raise ValueError("kv: caches must be contiguous")
    check_tensor("query", query)
    if query.stride(1) != head_dim:
        raise ValueError("query: the heads of a token must be contiguous")
    if num_q_heads % kv.num_kv_heads:
        raise ValueError(f"query: {num_q_heads} heads are no multiple of {kv.num_kv_heads}")
    if features.sinks is not None:
        check_tensor("features.sinks", features.sinks, (num_q_heads,), device=query.device)
    return batch.plan


def scales_of(kv: PagedKV) -> tuple[Tensor, Tensor]:
    """The scales, or something in their place that no kernel reads."""
    if kv.key_scales is None or kv.value_scales is None:
        return kv.keys, kv.values
    return kv.key_scales, kv.value_scales


def attention_constants(kv: PagedKV, features: AttentionFeatures) -> dict[str, Any]:
    """Compile-time arguments that follow from the layer."""
    k_dim, v_dim = kv.keys.shape[3], kv.values.shape[3]
    return {
        "WINDOW": features.sliding_window or 0,
        "CHUNK": features.chunk or 0,
        "SOFT_CAP": features.soft_cap or 0.0,
        "SCALED": kv.key_scales is not None,
        "HEADS": kv.num_kv_heads,
        "K_DIM": k_dim,
        "K_PAD": padded_dim(k_dim),
        "V_DIM": v_dim,
        "V_PAD": padded_dim(v_dim),
        "PAGE": kv.block_size,
    }


def padded_dim(head_dim: int) -> int:
    """A power of two that a dot accepts."""
    return max(16, int(triton.next_power_of_2(head_dim)))
