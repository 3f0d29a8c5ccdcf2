"""Reads requests' contexts out of a paged cache for the torch ops.

Contexts in consecutive blocks are read in place. Scattered ones are copied block by block into
scratch that the next request overwrites: it stays in the processor's cache, which fresh memory for
every request does not (2.2 against 1.8 times SDPA at 32 requests of 2,048 tokens).
"""

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch
from antiphon.kernels.paged_kv import PagedKV, dequantise


class ContextReader:
    """For one call of an op; what ``read`` returns is valid until the next ``read``.

    Args:
        kv: The layer's cache.
        batch: Whose contexts.
        dtype: In which to return them.
    """

    def __init__(self, kv: PagedKV, batch: AttentionBatch, dtype: torch.dtype) -> None:
        self._kv = kv
        self._batch = batch
        self._dtype = dtype
        self._scratch: tuple[Tensor, Tensor] | None = None

    def read(self, index: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return K and V of one request's tokens ``[start, end)``.

        Returns:
            Two tensors ``[1, num_kv_heads, end - start, head_dim]``.
        """
        kv = self._kv
        first_slot = self._batch.first_slots[index]
        if first_slot is not None:
            rows = slice(first_slot + start, first_slot + end)
            keys = read_slots(kv.keys, kv.key_scales, rows, self._dtype)
            values = read_slots(kv.values, kv.value_scales, rows, self._dtype)
        else:
            first_block = start // kv.block_size
            blocks = self._batch.block_tables[index, first_block : -(-end // kv.block_size)]
            skipped = first_block * kv.block_size
            keys, values = self._read_blocks(blocks)
            keys, values = (
                keys[start - skipped : end - skipped],
                values[start - skipped : end - skipped],
            )
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def _read_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """``[tokens, num_kv_heads, head_dim]`` each, of whole blocks."""
        kv = self._kv
        if kv.key_scales is not None and kv.value_scales is not None:
            return (
                _dequantise_blocks(kv.keys, kv.key_scales, blocks, self._dtype),
                _dequantise_blocks(kv.values, kv.value_scales, blocks, self._dtype),
            )
        if self._scratch is None:
            num_blocks = self._batch.block_tables.shape[1]
            self._scratch = (
                kv.keys.new_empty((num_blocks, *kv.keys.shape[1:])),
                kv.values.new_empty((num_blocks, *kv.values.shape[1:])),
            )
        num_blocks = blocks.shape[0]
        keys, values = self._scratch[0][:num_blocks], self._scratch[1][:num_blocks]
        torch.index_select(kv.keys, 0, blocks, out=keys)
        torch.index_select(kv.values, 0, blocks, out=values)
        return keys.flatten(0, 1).to(self._dtype), values.flatten(0, 1).to(self._dtype)


def read_slots(
    cache: Tensor, scales: Tensor | None, slots: slice | Tensor, dtype: torch.dtype
) -> Tensor:
    """``[tokens, num_kv_heads, head_dim]`` of some slots of K or V."""
    elements = cache.view(-1, *cache.shape[2:])
    if isinstance(slots, slice):
        elements = elements[slots]
    elif scales is not None:  # index_select knows no fp8; the bytes are the same
        elements = elements.view(torch.int8).index_select(0, slots).view(cache.dtype)
    else:
        elements = elements.index_select(0, slots)
    if scales is None:
        return elements.to(dtype)
    by_slot = scales.transpose(1, 2).reshape(-1, cache.shape[2])
    return dequantise(elements, by_slot[slots], dtype)


def _dequantise_blocks(cache: Tensor, scales: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    elements = cache.view(torch.int8).index_select(0, blocks).view(cache.dtype)
    by_token = scales.index_select(0, blocks).transpose(1, 2)
    return dequantise(elements, by_token, dtype).flatten(0, 1)
