"""Cache slots to the canonical wire order, and back: one launch for all layers of one shape.

Parallelism: one program per token and (layer, side), which carries all heads of the token.
Numerics:    a conversion between dtypes goes through float32; a quantised format meets itself
             unchanged, scales included.
Source:      the wire order is this project's (docs/design.md); quantisation as in ``paged_kv``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from antiphon.kernels.launch import padded_dim
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, WireKV
from antiphon.kernels.write_kv import quantise


@dataclass(frozen=True, slots=True)
class SideTable:
    """The caches of one head count and width, as a kernel finds them.

    Attributes:
        pointers: ``[num_sides, 2]`` int64: address of the elements and of their scales.
        offsets: ``[num_sides, 2]`` int64: where a side begins on the wire, in elements and in
            scales, for one token; multiply by the number of tokens.
        num_heads: Of each side.
        head_dim: Of each side.
        is_aligned: Whether offsets in elements are multiples of 16, as heads of usual width have.
    """

    pointers: Tensor
    offsets: Tensor
    num_heads: int
    head_dim: int
    is_aligned: bool


def make_side_tables(layers: Sequence[PagedKV]) -> tuple[SideTable, ...]:
    """Describe every K and V to the kernel; once for a cache, since it copies to the device."""
    pointers: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    offsets: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    at = scale_at = 0
    for layer in layers:
        for cache, scales in (
            (layer.keys, layer.key_scales),
            (layer.values, layer.value_scales),
        ):
            num_heads, head_dim = cache.shape[2:]
            address = cache.data_ptr()
            pointers[num_heads, head_dim].append(
                (address, address if scales is None else scales.data_ptr())
            )
            offsets[num_heads, head_dim].append((at, scale_at))
            at += num_heads * head_dim
            scale_at += num_heads
    device = layers[0].keys.device
    return tuple(
        SideTable(
            torch.tensor(pointers[shape], dtype=torch.int64, device=device),
            torch.tensor(offsets[shape], dtype=torch.int64, device=device),
            *shape,
            all(offset % 16 == 0 for offset, _ in offsets[shape]),
        )
        for shape in pointers
    )


@triton.jit(do_not_specialize=["num_tokens"])  # see prefill_attention
def _copy_kv_kernel(
    like_cache_ptr,  # any cache tensor: its element type is that of all
    wire_ptr,  # elements of WireKV
    wire_scales_ptr,  # float32, if the wire is quantised
    slots_ptr,  # [num_tokens] int64
    pointers_ptr,  # [num_sides, 2] int64
    offsets_ptr,  # [num_sides, 2] int64
    num_tokens,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,  # offsets are multiples of 16
    TO_WIRE: tl.constexpr,
    PLAIN: tl.constexpr,  # both ends hold the same format
    FROM_SCALED: tl.constexpr,
    LIMIT: tl.constexpr,  # of the target format; 0.0: not quantised
    ROUNDS: tl.constexpr,
):
    # grid: (num_tokens, num_sides)
    token, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    element_type = like_cache_ptr.dtype.element_ty
    cache_ptr = tl.load(pointers_ptr + side * 2).to(tl.pointer_type(element_type))
    cache_ptr = tl.multiple_of(cache_ptr, 16)
    scales_ptr = tl.load(pointers_ptr + side * 2 + 1).to(tl.pointer_type(tl.float32))
    heads, dims = tl.arange(0, HEADS_PAD), tl.arange(0, DIM_PAD)
    inside = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    elements = heads[:, None] * DIM + dims[None, :]
    cache_at = cache_ptr + slot * (HEADS * DIM) + elements
    first = tl.load(offsets_ptr + side * 2) * num_tokens
    if ALIGNED:  # or the wire would be accessed element by element
        first = tl.multiple_of(first, 16)
    wire_at = wire_ptr + first + token * (HEADS * DIM) + elements
    cache_scale_at = scales_ptr + (slot // PAGE * HEADS + heads) * PAGE + slot % PAGE
    first_scale = tl.load(offsets_ptr + side * 2 + 1) * num_tokens
    wire_scale_at = wire_scales_ptr + first_scale + token * HEADS + heads
    if TO_WIRE:
        source, target, source_scale, target_scale = (
            cache_at, wire_at, cache_scale_at, wire_scale_at,
        )  # fmt: skip
    else:
        source, target, source_scale, target_scale = (
            wire_at, cache_at, wire_scale_at, cache_scale_at,
        )  # fmt: skip
    x = tl.load(source, mask=inside, other=0.0)
    if PLAIN:
        if FROM_SCALED:
            scales = tl.load(source_scale, mask=heads < HEADS, other=0.0)
            tl.store(target_scale, scales, mask=heads < HEADS)
        tl.store(target, x, mask=inside)
    else:
        x = x.to(tl.float32)
        if FROM_SCALED:
            x *= tl.load(source_scale, mask=heads < HEADS, other=0.0)[:, None]
        if LIMIT > 0:
            scales = tl.max(tl.abs(x), 1) / LIMIT
            x = quantise(x, scales[:, None], LIMIT, ROUNDS)
            tl.store(target_scale, scales, mask=heads < HEADS)
        tl.store(target, x.to(target.dtype.element_ty), mask=inside)


def gather_kv(
    layers: Sequence[PagedKV], slots: Tensor, wire: WireKV, tables: Sequence[SideTable]
) -> None:
    """Copy KV of cache slots into wire order, converting to the wire's dtype.

    Args:
        layers: The cache.
        slots: ``[num_tokens]`` int64.
        wire: Written whole.
        tables: ``make_side_tables(layers)``.

    Raises:
        ValueError: The wire has another size or lacks its scales.
    """
    copy_kv(layers, slots, wire, tables, to_wire=True)


def copy_kv(
    layers: Sequence[PagedKV],
    slots: Tensor,
    wire: WireKV,
    tables: Sequence[SideTable],
    *,
    to_wire: bool,
) -> None:
    """Launch the copy in either direction; see ``gather_kv`` and ``scatter_kv``."""
    num_tokens = slots.numel()
    _check_wire(wire, num_tokens, tables)
    if num_tokens == 0:
        return
    cache_dtype, wire_dtype = layers[0].keys.dtype, wire.elements.dtype
    source, target = (cache_dtype, wire_dtype) if to_wire else (wire_dtype, cache_dtype)
    limit = QUANTISED_LIMITS.get(target, 0.0)
    for table in tables:
        _copy_kv_kernel[(num_tokens, len(table.pointers))](
            layers[0].keys,
            wire.elements,
            wire.elements if wire.scales is None else wire.scales,
            slots,
            table.pointers,
            table.offsets,
            num_tokens,
            HEADS=table.num_heads,
            HEADS_PAD=int(triton.next_power_of_2(table.num_heads)),
            DIM=table.head_dim,
            DIM_PAD=padded_dim(table.head_dim),
            PAGE=layers[0].block_size,
            ALIGNED=table.is_aligned,
            TO_WIRE=to_wire,
            PLAIN=source == target,
            FROM_SCALED=source in QUANTISED_LIMITS,
            LIMIT=limit,
            ROUNDS=limit > 0 and not target.is_floating_point,
            num_warps=4,
        )


def _check_wire(wire: WireKV, num_tokens: int, tables: Sequence[SideTable]) -> None:
    num_elements = num_tokens * sum(len(t.pointers) * t.num_heads * t.head_dim for t in tables)
    if wire.elements.numel() != num_elements:
        raise ValueError(
            f"wire: holds {wire.elements.numel()} elements; {num_tokens} tokens need {num_elements}"
        )
    if (wire.scales is None) == (wire.elements.dtype in QUANTISED_LIMITS):
        raise ValueError(f"wire: scales do not go with {wire.elements.dtype}")
