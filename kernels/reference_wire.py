"""Torch twins of ``gather_kv`` and ``scatter_kv``, and the CPU path of the hand-off.

Where cache and wire hold the same format on a CPU, bytes are moved as rows (``block_rows``); every
other pair goes through torch, tensor by tensor.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antiphon.kernels.block_rows import (
    SideRows,
    make_side_rows,
    plan_moves,
    read_rows,
    write_rows,
)
from antiphon.kernels.paged_kv import PagedKV, WireKV, dequantise, quantise


def gather_kv(
    layers: Sequence[PagedKV],
    slots: Tensor,
    wire: WireKV,
    rows: Sequence[SideRows] | None = None,
) -> None:
    """Copy KV of cache slots into wire order, converting to the wire's dtype.

    A quantised cache crosses a wire of the same format unchanged, scales included; every other
    pair of dtypes goes through float32.

    Args:
        layers: The cache.
        slots: ``[num_tokens]`` int64.
        wire: Written whole.
        rows: ``make_side_rows(layers)``, if the caller keeps it.
    """
    if _is_plain(layers, wire):
        moves = plan_moves(slots, layers[0].block_size)
        for side, part in _sides(layers, slots.numel(), wire, rows):
            read_rows(side, moves, part)
        for of_cache, of_wire in _scale_pairs(layers, slots.numel(), wire):
            of_wire.copy_(_by_slot(of_cache, slots))
        return
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        source = _bytes(cache.view(-1, *cache.shape[2:])).index_select(0, slots).view(cache.dtype)
        if scales is not None:
            source = dequantise(source, _by_slot(scales, slots), torch.float32)
        if wire_scales is not None:
            quantised, new_scales = quantise(source, elements.dtype)
            _bytes(elements).copy_(_bytes(quantised))
            wire_scales.copy_(new_scales)
        else:
            elements.copy_(source)


def scatter_kv(
    layers: Sequence[PagedKV],
    slots: Tensor,
    wire: WireKV,
    rows: Sequence[SideRows] | None = None,
) -> None:
    """Copy KV in wire order to cache slots; the inverse of ``gather_kv``."""
    if _is_plain(layers, wire):
        moves = plan_moves(slots, layers[0].block_size)
        for side, part in _sides(layers, slots.numel(), wire, rows):
            write_rows(side, moves, part)
        for of_cache, of_wire in _scale_pairs(layers, slots.numel(), wire):
            _set_by_slot(of_cache, slots, of_wire)
        return
    for cache, scales, elements, wire_scales in _pairs(layers, slots.numel(), wire):
        new, new_scales = elements, wire_scales
        if cache.dtype != elements.dtype:
            if wire_scales is not None:
                new = dequantise(elements, wire_scales, torch.float32)
            if scales is not None:
                new, new_scales = quantise(new, cache.dtype)
            else:
                new = new.to(cache.dtype)
        target = _bytes(cache.view(-1, *cache.shape[2:]))
        target.index_copy_(0, slots, _bytes(new))
        if scales is not None and new_scales is not None:
            _set_by_slot(scales, slots, new_scales)


def _is_plain(layers: Sequence[PagedKV], wire: WireKV) -> bool:
    cache = layers[0].keys
    return cache.dtype == wire.elements.dtype and cache.device.type == "cpu"


def _sides(
    layers: Sequence[PagedKV], num_tokens: int, wire: WireKV, rows: Sequence[SideRows] | None
) -> Iterator[tuple[SideRows, npt.NDArray[np.uint8]]]:
    """The bytes of K and V in the cache, with their place on the wire."""
    raw = wire.elements.view(torch.uint8).numpy()
    offset = 0
    for side in make_side_rows(layers) if rows is None else rows:
        size = num_tokens * side.num_bytes_per_token
        yield side, raw[offset : offset + size]
        offset += size


def _scale_pairs(
    layers: Sequence[PagedKV], num_tokens: int, wire: WireKV
) -> Iterator[tuple[Tensor, Tensor]]:
    """The scales of every K and V of a quantised format, with their place on the wire."""
    if wire.scales is None:
        return
    for _, scales, _, wire_scales in _pairs(layers, num_tokens, wire):
        if scales is not None and wire_scales is not None:
            yield scales, wire_scales


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
