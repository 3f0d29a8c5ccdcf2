"""What it takes to read a few tokens out of a large quantised cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from antiphon.kernels.context_reader import read_slots
from antiphon.kernels.paged_kv import dequantise, quantise

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 500, 8, 3, 4
SLOTS = {
    "blocks": slice(160, 176),
    "parts of blocks": slice(165, 179),
    "within a block": slice(161, 164),
    "to the end": slice(3990, 4000),
    "scattered": torch.tensor([3, 3999, 160, 3, 161]),
}


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_reading_slots_copies_no_more_scales_than_their_blocks_have(
    slots: slice | Tensor, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    by_token = torch.randn(NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, HEAD_DIM)
    elements, scales = quantise(by_token, dtype)
    cache = elements.view(NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM)
    in_blocks = scales.view(NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS).transpose(1, 2).contiguous()
    with Largest() as largest:
        read = read_slots(cache, in_blocks, slots, torch.float32)
    assert read.equal(dequantise(elements, scales, torch.float32)[slots])
    assert largest.num_elements < 500, "of the 12,000 scales"
