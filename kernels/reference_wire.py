"""Torch twins of ``gather_kv`` and ``scatter_kv``, tensor by tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from antiphon.kernels.paged_kv import PagedKV, WireKV, dequantise, quantise
from antiphon.kernels.slot_rows import rows_of, slot_rows


def gather_kv(layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
    """Copy KV of cache slots into wire order, converting to the wire's dtype.

    A quantised cache crosses a wire of the same format unchanged, scales included; every other
    pair of dtypes goes through float32.

    Args:
        layers: The cache.
        slots: ``[num_tokens]`` int64.
        wire: Written whole.
    """
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        rows = _bytes(slot_rows(cache)).index_select(0, rows_of(slots, cache)).view(cache.dtype)
        of_slots = None if scales is None else _by_slot(scales, slots)
        if cache.dtype != elements.dtype:
            if of_slots is not None:
                rows, of_slots = dequantise(rows, of_slots, torch.float32), None
            if wire_scales is not None:
                rows, of_slots = quantise(rows, elements.dtype)
            else:
                rows = rows.to(elements.dtype)
        _bytes(elements).copy_(_bytes(rows))
        if wire_scales is not None and of_slots is not None:
            wire_scales.copy_(of_slots)


def scatter_kv(layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
    """Copy KV in wire order to cache slots; the inverse of ``gather_kv``."""
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        new, new_scales = elements, wire_scales
        if cache.dtype != elements.dtype:
            if wire_scales is not None:
                new = dequantise(elements, wire_scales, torch.float32)
            if scales is not None:
                new, new_scales = quantise(new, cache.dtype)
            else:
                new = new.to(cache.dtype)
        _bytes(slot_rows(cache)).index_copy_(0, rows_of(slots, cache), _bytes(new))
        if scales is not None and new_scales is not None:
            _set_by_slot(scales, slots, new_scales)


def _bytes(x: Tensor) -> Tensor:
    """fp8 as int8, which torch can index and copy."""
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x


def _by_slot(scales: Tensor, slots: Tensor) -> Tensor:
    """``[num_blocks, num_kv_heads, block_size] -> [num_tokens, num_kv_heads]``."""
    block_size = scales.shape[2]
    return scales[slots // block_size, :, slots % block_size]


def _set_by_slot(scales: Tensor, slots: Tensor, new: Tensor) -> None:
    block_size = scales.shape[2]
    scales[slots // block_size, :, slots % block_size] = new


def _pairs(
    layers: Sequence[PagedKV], num_tokens: int, wire: WireKV
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """Every cache tensor and its scales, with their places on the wire."""
    offset = scale_offset = 0
    for layer in layers:
        for cache, scales in (
            (layer.keys, layer.key_scales),
            (layer.values, layer.value_scales),
        ):
            num_heads, head_dim = cache.shape[2:]
            num_rows = num_tokens * num_heads
            size = num_rows * head_dim
            elements = wire.elements[offset : offset + size].view(num_tokens, num_heads, head_dim)
            offset += size
            wire_scales = None
            if wire.scales is not None:
                wire_scales = wire.scales[scale_offset : scale_offset + num_rows]
                wire_scales = wire_scales.view(num_tokens, num_heads)
                scale_offset += num_rows
            yield cache, scales, elements, wire_scales
