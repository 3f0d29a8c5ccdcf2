"""Cache to wire against the torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_case import assert_same_wire, make_layers, make_wire

from antiphon.kernels import reference
from antiphon.kernels.gather_kv import gather_kv, make_side_tables
from antiphon.kernels.paged_kv import PagedKV, WireKV
from antiphon.kernels.scatter_kv import scatter_kv

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("wire_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_equals_the_reference(
    dtype: torch.dtype, wire_dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    slots = torch.tensor([9, 2, 3, 21, 0], dtype=torch.int64, device=device)
    layers = make_layers(dtype, 4, device, slots)
    actual, expected = (make_wire(wire_dtype, 5, device) for _ in range(2))
    gather_kv(layers, slots, actual, make_side_tables(layers))
    reference.gather_kv(layers, slots, expected)
    assert_same_wire(actual, expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_token_counts(num_tokens: int, device: torch.device) -> None:
    slots = torch.arange(num_tokens, device=device) + 3
    layers = make_layers(torch.float16, 5, device, slots)
    actual, expected = (make_wire(torch.float16, num_tokens, device) for _ in range(2))
    gather_kv(layers, slots, actual, make_side_tables(layers))
    reference.gather_kv(layers, slots, expected)
    assert_same_wire(actual, expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    slots=st.lists(st.integers(0, 60), max_size=6, unique=True),
    block_size=st.sampled_from([1, 4, 16, 19]),
    dtype=st.sampled_from(DTYPES),
    wire_dtype=st.sampled_from(DTYPES),
)
def test_random_slots(
    slots: list[int],
    block_size: int,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    where = torch.tensor(slots, dtype=torch.int64, device=device)
    layers = make_layers(dtype, block_size, device, where)
    actual, expected = (make_wire(wire_dtype, len(slots), device) for _ in range(2))
    gather_kv(layers, where, actual, make_side_tables(layers))
    reference.gather_kv(layers, where, expected)
    assert_same_wire(actual, expected)


def test_a_cache_beyond_32_bit_offsets_there_and_back(device: torch.device) -> None:
    num_blocks = 2**31 // (16 * 2 * 64) + 2
    shape = (num_blocks, 16, 2, 64)
    kv = PagedKV(*(torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)))
    kv.keys[-1], kv.values[-1] = (torch.randn(16, 2, 64, device=device).half() for _ in range(2))
    slots = torch.tensor([num_blocks * 16 - 1, num_blocks * 16 - 9], device=device)
    wire = WireKV(torch.zeros(2 * 2 * 2 * 64, dtype=torch.float16, device=device))
    tables = make_side_tables([kv])
    gather_kv([kv], slots, wire, tables)
    keys, values = wire.elements.view(2, 2, 2, 64)
    assert torch.equal(keys, kv.keys[-1, [15, 7]])
    assert torch.equal(values, kv.values[-1, [15, 7]])
    scatter_kv([kv], slots - 2, wire, tables)
    assert torch.equal(kv.keys[-1, [13, 5]], keys)
    assert torch.equal(kv.values[-1, [13, 5]], values)


def test_a_wire_of_another_size_is_refused(device: torch.device) -> None:
    slots = torch.arange(3, device=device)
    layers = make_layers(torch.float32, 4, device, slots)
    tables = make_side_tables(layers)
    with pytest.raises(ValueError, match="3 tokens need"):
        gather_kv(layers, slots, make_wire(torch.float32, 2, device), tables)
    bare = WireKV(make_wire(torch.int8, 3, device).elements)
    with pytest.raises(ValueError, match="scales"):
        gather_kv(layers, slots, bare, tables)
