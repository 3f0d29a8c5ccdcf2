"""A cache on the CPU, moved to and from a wire of its own format as bytes.

A hand-off on one core is bound by what each byte costs, and a short one by the number of calls. So
views are made once for a cache, and each block moves in one call of numpy, all layers together.
Where a block keeps K and V of all layers side by side, a segment of one block is a copy from end to
end.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from antiphon.kernels.paged_kv import PagedKV

_Rows = npt.NDArray[Any]


class Run(NamedTuple):
    """Tokens of a segment that lie side by side in one block: which, and their places in both."""

    block: int
    in_block: slice
    in_segment: slice


def find_runs(block_table: Sequence[int], block_size: int, start: int, end: int) -> Iterator[Run]:
    """Cut tokens ``[start, end)`` of a request at the ends of its blocks."""
    first = start
    while first < end:
        index, offset = divmod(first, block_size)
        stop = min(end, first - offset + block_size)
        in_block = slice(offset, offset + stop - first)
        yield Run(block_table[index], in_block, slice(first - start, stop - start))
        first = stop


class BlockRows:
    """K and V of all layers, scales first, in the order of the wire.

    Args:
        layers: The cache, on the CPU.
    """

    def __init__(self, layers: Sequence[PagedKV]) -> None:
        scales = [
            side.transpose(1, 2)
            for layer in layers
            for side in (layer.key_scales, layer.value_scales)
            if side is not None
        ]
        elements = [
            side.view(torch.uint8).flatten(2)
            for layer in layers
            for side in (layer.keys, layer.values)
        ]
        # Of each ``[num_blocks, num_sides, block_size, width]``.
        self._parts = [part.numpy() for part in (*_stacked(scales), *_stacked(elements))]

    def read(self, runs: Iterable[Run], num_tokens: int, wire: Tensor) -> None:
        """Copy tokens to ``wire``, uint8 ``[num_tokens * bytes per token]``."""
        parts = list(zip(self._parts, self._on_wire(wire, num_tokens), strict=True))
        for run in runs:
            for cache, segment in parts:
                segment[:, run.in_segment] = cache[run.block, :, run.in_block]

    def write(self, runs: Iterable[Run], num_tokens: int, wire: Tensor) -> None:
        """Copy ``wire`` to tokens; the inverse of ``read``."""
        parts = list(zip(self._parts, self._on_wire(wire, num_tokens), strict=True))
        for run in runs:
            for cache, segment in parts:
                cache[run.block, :, run.in_block] = segment[:, run.in_segment]

    def _on_wire(self, wire: Tensor, num_tokens: int) -> Iterator[_Rows]:
        """The places of the parts, ``[num_sides, num_tokens, width]`` of each."""
        raw = wire.numpy()
        offset = 0
        for part in self._parts:
            _, num_sides, _, width = part.shape
            size = num_sides * num_tokens * width * part.itemsize
            yield raw[offset : offset + size].view(part.dtype).reshape(num_sides, num_tokens, width)
            offset += size


def _stacked(sides: Sequence[Tensor]) -> Sequence[Tensor]:
    """All sides in one view, block by block, if they are evenly spaced in one allocation."""
    if not sides:
        return []
    first = sides[0]
    space = sides[1].storage_offset() - first.storage_offset()
    if any(
        side.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        or side.shape != first.shape
        or side.stride() != first.stride()
        or side.storage_offset() != first.storage_offset() + index * space
        for index, side in enumerate(sides)
    ):
        return [side[:, None] for side in sides]
    num_blocks, *of_block = first.shape
    between, *strides = first.stride()
    return [first.as_strided((num_blocks, len(sides), *of_block), (between, space, *strides))]
