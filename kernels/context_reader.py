"""Reads requests' contexts out of a paged cache for the torch ops.

A decode step meets KV that is in no processor cache, since every other layer's weights and KV came
in between. There a copy whole block by whole block, which reads memory in order, into scratch that
stays in cache is faster than reading heads in place, a row in every ``num_kv_heads`` at a time. The
scratch is the batch's, so all layers of a step use the same: fresh memory for each is what the page
faults of 3 MB cost.
"""

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch
from antiphon.kernels.paged_kv import PagedKV, dequantise
from antiphon.kernels.slot_rows import rows_of, slot_rows


class ContextReader:
    """For one call of an op; what ``read`` returns is valid until the next ``read``.

    Args:
        kv: The layer's cache.
        batch: Whose contexts.
        dtype: In which to return them.
    """

    def __init__(self, kv: PagedKV, batch: AttentionBatch, dtype: torch.dtype) -> None:
        self._block_size = kv.block_size
        self._sides = ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
        self._batch = batch
        self._dtype = dtype

    def read(
        self, index: int, start: int, end: int, repeats: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one request's tokens ``[start, end)``.

        Args:
            index: Of the request.
            start: First token.
            end: One past the last.
            repeats: Return each head so many times, and the tokens of each together: for a caller
                that reads them more than once.

        Returns:
            Two tensors ``[1, num_kv_heads * repeats, end - start, head_dim]``.
        """
        block_size, first_slot = self._block_size, self._batch.first_slots[index]
        first, stop = start // block_size, -(-end // block_size)
        blocks: slice | Tensor
        if first_slot is None:
            blocks = self._batch.block_tables[index, first:stop]
        else:
            run = first_slot // block_size
            blocks = slice(run + first, run + stop)
        rows = slice(start - first * block_size, end - first * block_size)
        in_place = repeats is not None
        keys = self._read_blocks(0, blocks, in_place=in_place)
        values = self._read_blocks(1, blocks, in_place=in_place)
        return _by_head(keys, rows, repeats), _by_head(values, rows, repeats)

    def _read_blocks(self, side: int, blocks: slice | Tensor, *, in_place: bool) -> Tensor:
        """``[blocks, block_size, num_kv_heads, head_dim]`` of K or V."""
        cache, scales = self._sides[side]
        if scales is not None:
            elements = _select(cache.view(torch.int8), blocks).view(cache.dtype)
            return dequantise(elements, _select(scales, blocks).transpose(1, 2), self._dtype)
        if isinstance(blocks, slice):
            source = cache[blocks]
            if in_place:
                return source.to(self._dtype)
            return self._batch.scratch.take(side, self._dtype, tuple(source.shape)).copy_(source)
        shape = (len(blocks), *cache.shape[1:])
        scratch = self._batch.scratch.take(side, cache.dtype, shape)
        return torch.index_select(cache, 0, blocks, out=scratch).to(self._dtype)


def _by_head(blocks: Tensor, tokens: slice, repeats: int | None) -> Tensor:
    """``[blocks, block_size, heads, head_dim] -> [1, heads * repeats, tokens, head_dim]``."""
    if repeats is None:
        return blocks.flatten(0, 1)[tokens].transpose(0, 1)[None]
    count, block_size, num_heads, head_dim = blocks.shape
    repeated = blocks.permute(2, 0, 1, 3)[:, None].expand(-1, repeats, -1, -1, -1)
    return repeated.reshape(1, num_heads * repeats, count * block_size, head_dim)[:, :, tokens]


def _select(x: Tensor, blocks: slice | Tensor) -> Tensor:
    return x[blocks] if isinstance(blocks, slice) else x.index_select(0, blocks)


def read_slots(cache: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """``[tokens, num_kv_heads, head_dim]`` of some slots of K or V."""
    rows, at = slot_rows(cache), rows_of(slots, cache)
    if scales is None:
        return rows.index_select(0, at).to(dtype)
    # index_select knows no fp8; the bytes are the same
    elements = rows.view(torch.int8).index_select(0, at).view(cache.dtype)
    block_size = cache.shape[1]
    return dequantise(elements, scales[slots // block_size, :, slots % block_size], dtype)
