"""Wire to cache against the torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from wire_case import make_layers, make_wire

from antiphon.kernels import reference
from antiphon.kernels.gather_kv import gather_kv, make_side_tables
from antiphon.kernels.scatter_kv import scatter_kv

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
SOURCE, TARGET = [9, 2, 3, 21, 0], [1, 17, 4, 5, 30]


@pytest.mark.parametrize("wire_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_equals_the_reference(
    dtype: torch.dtype, wire_dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    source, target = (torch.tensor(x, dtype=torch.int64, device=device) for x in (SOURCE, TARGET))
    wire = make_wire(wire_dtype, 5, device)
    reference.gather_kv(make_layers(torch.float32, 4, device, source), source, wire)
    nobody = torch.empty(0, dtype=torch.int64, device=device)
    results = []
    for op in ("kernel", "reference"):
        layers = make_layers(dtype, 16, device, nobody)
        if op == "kernel":
            scatter_kv(layers, target, wire, make_side_tables(layers))
        else:
            reference.scatter_kv(layers, target, wire)
        results.append(layers)
    for ours, theirs in zip(*results, strict=True):
        for name in ("keys", "values", "key_scales", "value_scales"):
            actual, expected = getattr(ours, name), getattr(theirs, name)
            if expected is not None:
                torch.testing.assert_close(
                    actual.float(), expected.float(), rtol=1e-6, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_of_one_format_changes_no_bit(
    dtype: torch.dtype, device: torch.device
) -> None:
    source, target = (torch.tensor(x, dtype=torch.int64, device=device) for x in (SOURCE, TARGET))
    sent = make_layers(dtype, 4, device, source)
    arrived = make_layers(dtype, 16, device, torch.empty(0, dtype=torch.int64, device=device))
    first, second = (make_wire(dtype, 5, device) for _ in range(2))
    gather_kv(sent, source, first, make_side_tables(sent))
    scatter_kv(arrived, target, first, make_side_tables(arrived))
    gather_kv(arrived, target, second, make_side_tables(arrived))
    assert torch.equal(first.elements.float(), second.elements.float())
    if first.scales is not None:
        assert torch.equal(first.scales, second.scales)
