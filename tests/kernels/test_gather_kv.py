"""Cache to wire against the torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from wire_case import assert_same_wire, make_layers, make_wire

from antiphon.kernels import reference
from antiphon.kernels.gather_kv import gather_kv, make_side_tables
from antiphon.kernels.paged_kv import WireKV

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


def test_a_wire_of_another_size_is_refused(device: torch.device) -> None:
    slots = torch.arange(3, device=device)
    layers = make_layers(torch.float32, 4, device, slots)
    tables = make_side_tables(layers)
    with pytest.raises(ValueError, match="3 tokens need"):
        gather_kv(layers, slots, make_wire(torch.float32, 2, device), tables)
    bare = WireKV(make_wire(torch.int8, 3, device).elements)
    with pytest.raises(ValueError, match="scales"):
        gather_kv(layers, slots, bare, tables)
