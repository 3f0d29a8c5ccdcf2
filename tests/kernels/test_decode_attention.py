"""Decode attention against float64 definitions, on a GPU or in the interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.decode_attention import decode_attention
from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode
from antiphon.kernels.tuning import DecodeConfig, PrefillConfig

pytestmark = pytest.mark.interpreter
PLAIN = AttentionFeatures(0.125)
CONFIG = DecodeConfig(block_n=16, num_warps=4, num_stages=2)
SHARED_CONFIG = PrefillConfig(block_m=128, block_n=16, num_warps=4, num_stages=2)


def run(
    case: AttentionCase, features: AttentionFeatures, num_items: int = 6, min_shared: int = 10**9
) -> torch.Tensor:
    capacity = DecodeCapacity(num_items, CONFIG.block_n, 3, min_shared)
    num_decode = len(case.requests)
    tables = case.tables[:num_decode]
    plan = plan_decode(case.seq_lens, tables, case.block_size, capacity, case.device)
    batch = replace(case.batch(decode=plan), num_decode_requests=num_decode)
    query = case.query(0, num_decode)
    return decode_attention(query, case.kv, batch, features, CONFIG, SHARED_CONFIG)


def check(case: AttentionCase, features: AttentionFeatures, **options: int) -> None:
    actual = run(case, features, **options)
    assert actual.dtype == case.dtype
    expected = case.expected(features, 0, len(case.requests))
    error = (actual.cpu().double() - expected).abs().max()
    assert float(error) <= case.bound()


@pytest.mark.parametrize("contexts", [[0], [15, 16, 17], [1, 100, 3], [63, 31, 48, 0, 7]], ids=str)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_ragged_batches(contexts: list[int], features: str, device: torch.device) -> None:
    case = AttentionCase([(start, 1) for start in contexts], device=device)
    check(case, PLAIN if features == "plain" else all_features(4, device))


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 1}, {"sliding_window": 20}, {"chunk": 24}, {"soft_cap": 1.5}, {"sinks": 1}],
    ids=str,
)
def test_each_feature(change: dict[str, object], device: torch.device) -> None:
    if "sinks" in change:
        change = {"sinks": torch.tensor([-4.0, 0.0, 1.0, 3.0], device=device)}
    check(AttentionCase([(50, 1), (9, 1)], device=device), replace(PLAIN, **change))


@pytest.mark.parametrize("num_items", [1, 3, 20])
def test_the_split_does_not_show(num_items: int, device: torch.device) -> None:
    check(AttentionCase([(120, 1), (40, 1)], device=device), PLAIN, num_items=num_items)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    check(AttentionCase([(37, 1)], dims=(head_dim, head_dim), device=device), PLAIN)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (9, 3), (32, 1)], ids=str)
def test_head_groups(heads: tuple[int, int], device: torch.device) -> None:
    check(AttentionCase([(37, 1)], heads, (32, 16), device=device), PLAIN)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int8),
        (torch.float16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_dtypes(
    dtype: torch.dtype, cache_dtype: torch.dtype, features: str, device: torch.device
) -> None:
    case = AttentionCase([(45, 1), (18, 1)], dtype=dtype, cache_dtype=cache_dtype, device=device)
    check(case, PLAIN if features == "plain" else all_features(4, device))


@pytest.mark.parametrize("features", ["plain", "all"])
def test_several_new_tokens_of_each_request(features: str, device: torch.device) -> None:
    case = AttentionCase([(33, 3), (0, 3), (14, 3)], device=device)
    check(case, PLAIN if features == "plain" else all_features(4, device))


def test_padding_of_a_captured_graph_gives_zeros(device: torch.device) -> None:
    case = AttentionCase([(20, 1), (-1, 1), (-1, 1)], device=device)
    actual = run(case, PLAIN)
    assert torch.equal(actual[1:], torch.zeros_like(actual[1:]))
    error = (actual[:1].cpu().double() - case.expected(PLAIN, 0, 1)).abs().max()
    assert float(error) <= case.bound()


@pytest.mark.parametrize("features", ["plain", "all", "window behind the prefix"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_a_shared_prefix_changes_nothing(
    features: str, cache_dtype: torch.dtype, device: torch.device
) -> None:
    chosen = {
        "plain": PLAIN,
        "all": all_features(4, device, window=60),
        "window behind the prefix": replace(PLAIN, sliding_window=5),
    }[features]
    # Two groups' worth of members: five requests, at most three in a program.
    requests = [(70, 1), (49, 1), (90, 1), (64, 1), (55, 1)]
    case = AttentionCase(requests, shared=48, cache_dtype=cache_dtype, device=device)
    check(case, chosen, num_items=12, min_shared=32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    contexts=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    heads=st.sampled_from([(2, 2), (4, 1), (3, 1), (4, 2)]),
    block_size=st.sampled_from([1, 4, 16, 19]),
    window=st.sampled_from([None, 7, 33]),
    num_items=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    contexts: list[int],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    num_items: int,
    seed: int,
    device: torch.device,
) -> None:
    requests = [(start, 1) for start in contexts]
    case = AttentionCase(requests, heads, (32, 32), block_size=block_size, device=device, seed=seed)
    check(case, replace(PLAIN, sliding_window=window), num_items=num_items)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    case = AttentionCase([(4, 1), (5, 1)], device=device)
    with pytest.raises(ValueError, match="decode plan"):
        decode_attention(case.query(0, 2), case.kv, case.batch(), PLAIN, CONFIG, SHARED_CONFIG)
    shared = AttentionCase([(40, 1)] * 3, heads=(8, 1), shared=32, device=device)
    plan = plan_decode(shared.seq_lens, shared.tables, 16, DecodeCapacity(4, 16, 3, 32), device)
    query, batch = shared.query(0, 3), shared.batch(decode=plan)
    small = replace(SHARED_CONFIG, block_m=16)
    with pytest.raises(ValueError, match="tile of 16"):
        decode_attention(query, shared.kv, batch, PLAIN, CONFIG, small)
