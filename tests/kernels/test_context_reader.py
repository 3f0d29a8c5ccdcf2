"""What reading contexts out of a cache returns, and how much it copies for that."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from antiphon.kernels.attention_batch import make_attention_batch
from antiphon.kernels.context_reader import ContextReader, read_slots
from antiphon.kernels.paged_kv import PagedKV, dequantise, quantise

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 500, 8, 3, 4
TABLES = {"one after the other": [20, 21, 22], "scattered": [499, 3, 20]}
SPANS = {"blocks": (8, 24), "parts of blocks": (5, 19), "within a block": (9, 12)}
CPU = torch.device("cpu")


class Largest(TorchDispatchMode):
    """Notes how many elements the largest new tensor has."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_elements = max(self.num_elements, out.numel())
        return out


def quantised(dtype: torch.dtype) -> tuple[PagedKV, Tensor, Tensor]:
    """A cache, and the values of all its slots in K and V."""
    torch.manual_seed(0)
    parts, values = [], []
    for _ in range(2):
        elements, scales = quantise(
            torch.randn(NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, HEAD_DIM), dtype
        )
        in_blocks = scales.view(NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS).transpose(1, 2).contiguous()
        parts.append((elements.view(NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM), in_blocks))
        values.append(dequantise(elements, scales, torch.float32))
    (keys, key_scales), (values_, value_scales) = parts
    return PagedKV(keys, values_, key_scales, value_scales), *values


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_slots_of_a_quantised_cache(dtype: torch.dtype) -> None:
    kv, keys, _ = quantised(dtype)
    slots = torch.tensor([3, 3999, 160, 3, 161])
    with Largest() as largest:
        read = read_slots(kv.keys, kv.key_scales, slots, torch.float32)
    assert read.equal(keys[slots])
    assert largest.num_elements < 500, "of the 12,000 scales"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("repeats", [None, 1, 2])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_context_of_a_quantised_cache(
    table: list[int], span: tuple[int, int], repeats: int | None, dtype: torch.dtype
) -> None:
    kv, *sides = quantised(dtype)
    batch = make_attention_batch([table], [23], [1], BLOCK_SIZE, CPU)
    with Largest() as largest:
        read = ContextReader(kv, batch, torch.float32).read(0, *span, repeats)
    slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(*span)]
    for got, side in zip(read, sides, strict=True):
        assert got.equal(side[slots].transpose(0, 1).repeat_interleave(repeats or 1, 0)[None])
    assert largest.num_elements < 1000, "of the 12,000 scales"


@pytest.mark.parametrize("repeats", [None, 1, 3])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("num_sides", [2, 7])
def test_a_context_of_a_cache_whose_blocks_hold_other_layers_too(
    num_sides: int, table: list[int], span: tuple[int, int], repeats: int | None
) -> None:
    torch.manual_seed(0)
    together = torch.randn(NUM_BLOCKS, num_sides, BLOCK_SIZE, NUM_HEADS, HEAD_DIM)
    kv = PagedKV(*together.unbind(1)[-2:])
    batch = make_attention_batch([table], [23], [1], BLOCK_SIZE, CPU)
    for got, side in zip(
        ContextReader(kv, batch, torch.float32).read(0, *span, repeats),
        together.unbind(1)[-2:],
        strict=True,
    ):
        context = side[table].flatten(0, 1)[slice(*span)].transpose(0, 1)
        assert got.equal(context.repeat_interleave(repeats or 1, 0)[None])
