"""The tensors behind the block ids, and their canonical form on the wire.

The wire carries ``[layers, 2, tokens, kv_heads, head_dim]`` in a dtype of its own: neither block
size nor block order nor the cache's dtype leaks to the other side. A quantised wire dtype brings
its scales, which come first because they want the stricter alignment. Layers may differ in heads
and widths, and K may differ from V; then the same order holds with each layer's own shape.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from antiphon.kernels.kernel_set import KernelSet
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, WireKV

_SCALE_DTYPE = torch.float32
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """KV shape of one layer."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def num_elements(self) -> int:
        """K and V elements per token."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """KV shape of a model, and the dtypes of its elements in the cache and on the wire."""

    layers: tuple[LayerLayout, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype

    @property
    def num_bytes_per_token(self) -> int:
        """K and V of all layers in the cache, with scales."""
        return self._num_elements * self.dtype.itemsize + self._num_scale_bytes(self.dtype)

    @property
    def num_wire_bytes_per_token(self) -> int:
        """K and V of all layers on the wire, with scales."""
        return self._num_elements * self.wire_dtype.itemsize + self.num_wire_scale_bytes

    @property
    def num_wire_scale_bytes(self) -> int:
        """The part of ``num_wire_bytes_per_token`` that is scales."""
        return self._num_scale_bytes(self.wire_dtype)

    @property
    def _num_elements(self) -> int:
        return sum(layer.num_elements for layer in self.layers)

    def _num_scale_bytes(self, dtype: torch.dtype) -> int:
        if dtype not in QUANTISED_LIMITS:
            return 0
        return sum(2 * layer.num_kv_heads for layer in self.layers) * _SCALE_DTYPE.itemsize


class KVCache:
    """Owns K and V of every block.

    Args:
        layout: Shapes and dtypes.
        num_blocks: Blocks in each layer.
        block_size: Tokens per block.
        device: Where the tensors live. Memory is committed by the operating system on first use.
        kernels: Copy between blocks and wire.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.num_bytes_per_token = layout.num_wire_bytes_per_token
        self._kernels = kernels
        self._places = np.arange(block_size)
        self._is_on_cpu = device.type == "cpu"
        self._num_scale_bytes = layout.num_wire_scale_bytes  # per token
        self.layers = self._allocate()

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        """Copy KV of tokens ``[start, end)`` into wire order.

        Args:
            block_table: Of the request, from its first token.
            start: First token.
            end: One past the last token.
            out: uint8 ``[num_bytes_per_token * (end - start)]``, contiguous, on ``device``. On a
                GPU the copy is queued on the current stream.
        """
        slots = self._slots(block_table, start, end)
        self._kernels.gather_kv(self.layers, slots, self._wire(out, end - start))

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a segment in wire order to tokens ``[start, end)``; the inverse of ``gather``."""
        slots = self._slots(block_table, start, end)
        self._kernels.scatter_kv(self.layers, slots, self._wire(segment, end - start))

    def _allocate(self) -> list[PagedKV]:
        """One allocation for all K and V of a shape, one tensor in it for each.

        A tensor for each, because one for all makes compiled steps several times slower; one
        allocation, because then a segment moves in one call.
        """
        layout, block = self.layout, (self.num_blocks, self.block_size)
        shapes = [
            (layer.num_kv_heads, head_dim)
            for layer in layout.layers
            for head_dim in (layer.k_head_dim, layer.v_head_dim)
        ]
        stacks = {
            shape: iter(self._stack(count, (*block, *shape)))
            for shape, count in Counter(shapes).items()
        }
        sides = [next(stacks[shape]) for shape in shapes]
        return [
            PagedKV(keys, values, *self._scales(layer))
            for layer, keys, values in zip(layout.layers, sides[::2], sides[1::2], strict=True)
        ]

    def _stack(self, count: int, shape: tuple[int, ...]) -> list[Tensor]:
        """Tensors in one allocation, each where kernels want a tensor to begin."""
        size = math.prod(shape)
        padded = size + -size % (_ALIGNMENT // self.layout.dtype.itemsize)
        rows = self._empty((count, padded), self.layout.dtype)
        return [row[:size].view(shape) for row in rows]

    def _scales(self, layer: LayerLayout) -> list[Tensor | None]:
        if self.layout.dtype not in QUANTISED_LIMITS:
            return [None, None]
        shape = (self.num_blocks, layer.num_kv_heads, self.block_size)
        return [self._empty(shape, _SCALE_DTYPE), self._empty(shape, _SCALE_DTYPE)]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        # In numpy, and of the blocks concerned alone: a segment is sent in 300 us, and looking up
        # its tokens in torch took 50.
        size = self.block_size
        if end > len(block_table) * size:
            raise IndexError(
                f"token {end - 1} is beyond the {len(block_table)} blocks of its table"
            )
        first = start // size
        blocks = np.array(block_table[first : -(-end // size)], dtype=np.int64)
        slots = (blocks[:, None] * size + self._places).reshape(-1)[start - first * size :]
        found = torch.from_numpy(slots[: end - start])
        return found if self._is_on_cpu else found.to(self.device)

    def _wire(self, segment: Tensor, num_tokens: int) -> WireKV:
        num_scale_bytes = self._num_scale_bytes * num_tokens
        if not num_scale_bytes:
            return WireKV(segment.view(self.layout.wire_dtype))
        elements = segment[num_scale_bytes:].view(self.layout.wire_dtype)
        return WireKV(elements, segment[:num_scale_bytes].view(_SCALE_DTYPE))
