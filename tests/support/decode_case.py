"""Runs decode attention on an ``AttentionCase`` and holds it against the definitions."""

from dataclasses import replace

import torch
from attention_case import AttentionCase
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.decode_attention import decode_attention
from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode
from antiphon.kernels.tuning import DecodeConfig, PrefillConfig

PLAIN = AttentionFeatures(0.125)
CONFIG = DecodeConfig(block_n=16, num_warps=4, num_stages=2)
SHARED_CONFIG = PrefillConfig(block_m=128, block_n=16, num_warps=4, num_stages=2)
MEMBERS_PER_ITEM = 3


def planned(case: AttentionCase, num_items: int = 6, min_shared: int = 10**9) -> AttentionBatch:
    """All requests as decode requests; prefixes of ``min_shared`` tokens on are shared."""
    capacity = DecodeCapacity(num_items, CONFIG.block_n, MEMBERS_PER_ITEM, min_shared)
    plan = plan_decode(case.seq_lens, case.tables, case.block_size, capacity, case.device)
    return replace(case.batch(decode=plan), num_decode_requests=len(case.requests))


def run(case: AttentionCase, features: AttentionFeatures, **options: int) -> Tensor:
    """The op's answer."""
    query = case.query(0, len(case.requests))
    batch = planned(case, **options)
    return decode_attention(query, case.kv, batch, features, CONFIG, SHARED_CONFIG)


def check(case: AttentionCase, features: AttentionFeatures, **options: int) -> None:
    """Fail if the answer is further off than the dtype's bound."""
    actual = run(case, features, **options)
    assert actual.dtype == case.dtype
    expected = case.expected(features, 0, len(case.requests))
    error = (actual.cpu().double() - expected).abs().max()
    assert float(error) <= case.bound()


def random_features(
    window: int | None, chunk: int | None, extras: bool, num_q_heads: int, device: torch.device
) -> AttentionFeatures:
    """What hypothesis drew; the extras are a soft cap and sinks."""
    sinks = torch.linspace(-1, 2, num_q_heads, device=device) if extras else None
    return AttentionFeatures(0.125, window, chunk, 3.0 if extras else None, sinks)
