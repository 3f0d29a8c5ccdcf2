"""Torch twins of ``gather_kv`` and ``scatter_kv``, and the CPU path of the hand-off.

A hand-off of a short prompt is bound by the number of torch calls, two for each layer, so the plain
case does nothing but one copy each: a slice where slots follow one another, else a selection.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from antiphon.kernels.paged_kv import PagedKV, WireKV, dequantise, quantise


def gather_kv(layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
    """Copy KV of cache slots into wire order, converting to the wire's dtype.

    A quantised cache crosses a wire of the same format unchanged, scales included; every other
    pair of dtypes goes through float32.

    Args:
        layers: The cache.
        slots: ``[num_tokens]`` int64.
        wire: Written whole.
    """
    rows = _rows(slots)
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        source = _select(cache.view(-1, *cache.shape[2:]), rows)
        if cache.dtype == elements.dtype:
            _bytes(elements).copy_(_bytes(source))
            if scales is not None and wire_scales is not None:
                wire_scales.copy_(_by_slot(scales, slots))
            continue
        if scales is not None:
            source = dequantise(source, _by_slot(scales, slots), torch.float32)
        if wire_scales is not None:
            quantised, new_scales = quantise(source, elements.dtype)
            _bytes(elements).copy_(_bytes(quantised))
            wire_scales.copy_(new_scales)
        else:
            elements.copy_(source)


def scatter_kv(layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
    """Copy KV in wire order to cache slots; the inverse of ``gather_kv``."""
    rows = _rows(slots)
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        if cache.dtype == elements.dtype:
            new, new_scales = elements, wire_scales
        else:
            new, new_scales = elements, None
            if wire_scales is not None:
                new = dequantise(elements, wire_scales, torch.float32)
            if scales is not None:
                new, new_scales = quantise(new, cache.dtype)
            else:
                new = new.to(cache.dtype)
        target = _bytes(cache.view(-1, *cache.shape[2:]))
        if isinstance(rows, slice):
            target[rows].copy_(_bytes(new))
        else:
            target.index_copy_(0, rows, _bytes(new))
        if scales is not None and new_scales is not None:
            block_size = scales.shape[2]
            scales[slots // block_size, :, slots % block_size] = new_scales


def _rows(slots: Tensor) -> slice | Tensor:
    """A slice if the slots follow one another."""
    count = slots.numel()
    if count and slots.device.type == "cpu":
        first, last = int(slots[0]), int(slots[-1])
        if last - first == count - 1 and bool((slots[1:] - slots[:-1] == 1).all()):
            return slice(first, first + count)
    return slots


def _select(cache: Tensor, rows: slice | Tensor) -> Tensor:
    if isinstance(rows, slice):
        return cache[rows]
    return _bytes(cache).index_select(0, rows).view(cache.dtype)


def _bytes(x: Tensor) -> Tensor:
    """fp8 as int8, which torch can index and copy."""
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x


def _by_slot(scales: Tensor, slots: Tensor) -> Tensor:
    """``[num_blocks, num_kv_heads, block_size] -> [num_tokens, num_kv_heads]``."""
    block_size = scales.shape[2]
    return scales[slots // block_size, :, slots % block_size]


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
