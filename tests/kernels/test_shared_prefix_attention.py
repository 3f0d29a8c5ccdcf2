"""Shared prefixes against float64 definitions and the torch twin, on a GPU or interpreted."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features
from decode_case import CONFIG, PLAIN, SHARED_CONFIG, check, planned, random_features
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels import reference
from antiphon.kernels.decode_attention import decode_attention
from antiphon.kernels.shared_prefix_attention import shared_prefix_attention
from antiphon.kernels.shared_prefixes import find_shared_prefixes

pytestmark = pytest.mark.interpreter
LOG2_E = 1.4426950408889634
# Five members are two programs, of three at most.
REQUESTS = [(49, 1), (55, 1), (64, 1), (70, 1), (90, 1)]


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
    case = AttentionCase(REQUESTS, shared=48, cache_dtype=cache_dtype, device=device)
    check(case, chosen, num_items=12, min_shared=32)


@pytest.mark.parametrize("window", [None, 40, 5])
@pytest.mark.parametrize("num_items", [1, 12])
def test_the_parts_amount_to_what_the_twin_says(
    window: int | None, num_items: int, device: torch.device
) -> None:
    case = AttentionCase([*REQUESTS, (99, 1)], shared=48, num_alone=1, device=device)
    batch = planned(case, num_items=num_items, min_shared=32)
    features = replace(PLAIN, sliding_window=window, soft_cap=4.0)
    query, plan = case.query(0, 6), batch.plan.decode
    partial = torch.full((plan.num_rows, 1, 4, 64), float("nan"), device=device)
    lse = torch.full((plan.num_rows, 1, 4), float("nan"), device=device)
    shared_prefix_attention(query, case.kv, batch, features, SHARED_CONFIG, (partial, lse))
    found = find_shared_prefixes(case.seq_lens, case.tables, case.block_size, 32)
    on_host = replace(
        batch,
        seq_lens=tuple(case.seq_lens),
        first_slots=(None,) * 6,
        shared_prefixes=tuple(found),
    )
    expected, expected_lse = reference.shared_prefix_attention(query, case.kv, on_host, features)
    num_parts = int(plan.shared_items[0, 3])
    for member in range(5):
        first = int(plan.part_offsets[member])
        own, own_lse = partial[first : first + num_parts, 0], lse[first : first + num_parts, 0]
        merged_lse = torch.logsumexp(own_lse / LOG2_E, 0)
        weights = torch.nan_to_num(torch.exp(own_lse / LOG2_E - merged_lse))
        torch.testing.assert_close(merged_lse, expected_lse[member], rtol=1e-5, atol=1e-5)
        merged = (own * weights[..., None]).sum(0)
        torch.testing.assert_close(merged, expected[member], rtol=1e-5, atol=1e-5)
    assert torch.isneginf(expected_lse[5]).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    own=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    num_blocks=st.integers(1, 4),
    block_size=st.sampled_from([4, 16, 19]),
    heads=st.sampled_from([(2, 2), (4, 1), (3, 1), (4, 2)]),
    num_new=st.integers(1, 3),
    window=st.sampled_from([None, 7, 33]),
    extras=st.booleans(),
    num_items=st.integers(1, 8),
)
def test_random_shapes(
    own: list[int],
    num_blocks: int,
    block_size: int,
    heads: tuple[int, int],
    num_new: int,
    window: int | None,
    extras: bool,
    num_items: int,
    device: torch.device,
) -> None:
    shared = num_blocks * block_size
    case = AttentionCase(
        [(shared + length, num_new) for length in own],
        heads,
        (32, 16),
        block_size=block_size,
        shared=shared,
        device=device,
    )
    features = random_features(window, None, extras, heads[0], device)
    check(case, features, num_items=num_items, min_shared=block_size)


def test_a_cache_beyond_32_bit_offsets(device: torch.device) -> None:
    case = AttentionCase([(20, 1)] * 2, (2, 1), dtype=torch.float16, shared=16, device=device)
    case.move_far()
    case.tables[1][0] = case.tables[0][0]
    check(case, PLAIN, min_shared=16)


def test_more_members_than_a_tile_has_rows_for_are_refused(device: torch.device) -> None:
    case = AttentionCase([(40, 1)] * 3, heads=(8, 1), shared=32, device=device)
    batch = planned(case, min_shared=32)
    small = replace(SHARED_CONFIG, block_m=16)
    with pytest.raises(ValueError, match="tile of 16"):
        decode_attention(case.query(0, 3), case.kv, batch, PLAIN, CONFIG, small)
