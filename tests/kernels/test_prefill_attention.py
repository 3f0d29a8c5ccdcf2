"""Prefill attention against float64 definitions, on a GPU or in the interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features
from decode_case import random_features
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.prefill_attention import prefill_attention
from antiphon.kernels.prefill_plan import plan_prefill
from antiphon.kernels.tuning import PrefillConfig

pytestmark = pytest.mark.interpreter
PLAIN = AttentionFeatures(0.125)
CONFIG = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)


def check(case: AttentionCase, features: AttentionFeatures, config: PrefillConfig = CONFIG) -> None:
    first, stop = case.num_decode, len(case.requests)
    new = [count for _, count in case.requests[first:]]
    plan = plan_prefill(new, case.seq_lens[first:], first, config.block_m, case.device)
    query = case.query(first, stop)
    actual = prefill_attention(query, case.kv, case.batch(prefill=plan), features, config)
    assert actual.dtype == case.dtype
    error = (actual.cpu().double() - case.expected(features, first, stop)).abs().max()
    assert float(error) <= case.bound()


@pytest.mark.parametrize(
    "requests",
    [
        [(0, 2)],
        [(0, 17)],
        [(16, 16), (15, 2), (31, 5)],  # contexts that end on and off a block edge
        [(3, 1), (40, 1), (0, 7), (33, 18)],  # behind decode requests
        [(70, 3)],
        [(0, 2), (0, 1), (16, 1)],  # prompts of one token among longer ones
        [(0, 9), (5, 0), (3, 4)],  # a request without new tokens
    ],
    ids=str,
)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_batches(requests: list[tuple[int, int]], features: str, device: torch.device) -> None:
    case = AttentionCase(requests, device=device)
    check(case, PLAIN if features == "plain" else all_features(4, device))


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 1}, {"sliding_window": 20}, {"chunk": 24}, {"soft_cap": 1.5}, {"sinks": 1}],
    ids=str,
)
def test_each_feature(change: dict[str, object], device: torch.device) -> None:
    if "sinks" in change:
        change = {"sinks": torch.tensor([-4.0, 0.0, 1.0, 3.0], device=device)}
    check(AttentionCase([(19, 20), (0, 9)], device=device), replace(PLAIN, **change))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    check(AttentionCase([(5, 14)], dims=(head_dim, head_dim), device=device), PLAIN)


def test_keys_wider_than_values(device: torch.device) -> None:
    check(AttentionCase([(5, 14)], dims=(48, 32), device=device), PLAIN)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_dtypes(
    dtype: torch.dtype, cache_dtype: torch.dtype, features: str, device: torch.device
) -> None:
    case = AttentionCase([(18, 17), (0, 5)], dtype=dtype, cache_dtype=cache_dtype, device=device)
    check(case, PLAIN if features == "plain" else all_features(4, device))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 24)), min_size=1, max_size=3),
    heads=st.sampled_from([(2, 2), (4, 1), (3, 1), (4, 2)]),
    block_size=st.sampled_from([1, 4, 16, 19]),
    window=st.sampled_from([None, 7, 33]),
    chunk=st.sampled_from([None, 24]),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    chunk: int | None,
    extras: bool,
    seed: int,
    device: torch.device,
) -> None:
    (start, new), *others = requests
    requests = [(start, new + 1), *others]  # a first one with one new token would be a decode step
    case = AttentionCase(requests, heads, (32, 32), block_size=block_size, device=device, seed=seed)
    check(case, random_features(window, chunk, extras, heads[0], device))


def test_wider_tiles_than_the_prompt(device: torch.device) -> None:
    config = PrefillConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    check(AttentionCase([(40, 9), (0, 70)], heads=(2, 1), device=device), PLAIN, config)


def test_the_longest_context_goes_first() -> None:
    plan = plan_prefill([20, 8], [20, 100], 3, 16, torch.device("cpu"))
    assert plan.tiles.tolist() == [[4, 0], [3, 16], [3, 0]]


def test_a_cache_beyond_32_bit_offsets(device: torch.device) -> None:
    case = AttentionCase([(4, 3)], heads=(1, 1), dtype=torch.float16, device=device)
    case.move_far()
    check(case, PLAIN)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    case = AttentionCase([(4, 3)], device=device)
    query = case.query(0, 1)
    with pytest.raises(ValueError, match="plan"):
        prefill_attention(query, case.kv, case.batch(), PLAIN, CONFIG)
    plan = plan_prefill([3], [7], 0, 16, device)
    config = replace(CONFIG, block_m=32)
    with pytest.raises(ValueError, match="tiles of 32"):
        prefill_attention(query, case.kv, case.batch(prefill=plan), PLAIN, config)
    with pytest.raises(ValueError, match="heads"):
        prefill_attention(query[:, :3], case.kv, case.batch(prefill=plan), PLAIN, CONFIG)
