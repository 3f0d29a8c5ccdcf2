"""Decode attention against float64 definitions, on a GPU or in the interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features
from decode_case import CONFIG, PLAIN, SHARED_CONFIG, check, random_features, run
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels.decode_attention import decode_attention

pytestmark = pytest.mark.interpreter


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


def test_a_cache_beyond_32_bit_offsets(device: torch.device) -> None:
    case = AttentionCase([(20, 1)], heads=(2, 1), dtype=torch.float16, device=device)
    case.move_far()
    check(case, PLAIN)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    contexts=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    heads=st.sampled_from([(2, 2), (4, 1), (3, 1), (4, 2)]),
    block_size=st.sampled_from([1, 4, 16, 19]),
    window=st.sampled_from([None, 7, 33]),
    chunk=st.sampled_from([None, 24]),
    extras=st.booleans(),
    num_items=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    contexts: list[int],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    chunk: int | None,
    extras: bool,
    num_items: int,
    seed: int,
    device: torch.device,
) -> None:
    requests = [(start, 1) for start in contexts]
    case = AttentionCase(requests, heads, (32, 32), block_size=block_size, device=device, seed=seed)
    features = random_features(window, chunk, extras, heads[0], device)
    check(case, features, num_items=num_items)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    case = AttentionCase([(4, 1), (5, 1)], device=device)
    with pytest.raises(ValueError, match="decode plan"):
        decode_attention(case.query(0, 2), case.kv, case.batch(), PLAIN, CONFIG, SHARED_CONFIG)
