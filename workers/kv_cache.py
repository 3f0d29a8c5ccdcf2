"""The tensors behind the block ids, and their canonical form on the wire.

The wire carries ``[layers, 2, tokens, kv_heads, head_dim]`` in a dtype of its own: neither block
size nor block order nor the cache's dtype leaks to the other side. A quantised wire dtype brings
its scales, which come first because they want the stricter alignment. Layers may differ in heads
and widths, and K may differ from V; then the same order holds with each layer's own shape.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from antiphon.kernels.block_rows import BlockRows, Run, find_runs
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
        self._num_scale_bytes = layout.num_wire_scale_bytes  # per token
        self.layers = self._allocate()
        is_bytes = device.type == "cpu" and layout.wire_dtype == layout.dtype
        self._rows: BlockRows | None = None
        if is_bytes and kernels.keeps_blocks_together:
            self._rows = BlockRows(self.layers)

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        """Copy KV of tokens ``[start, end)`` into wire order.

        Args:
            block_table: Of the request, from its first token.
            start: First token.
            end: One past the last token.
            out: uint8 ``[num_bytes_per_token * (end - start)]``, contiguous, on ``device``. On a
                GPU the copy is queued on the current stream.
        """
        self._check(block_table, end)
        if self._rows is not None:
            self._rows.read(self._runs(block_table, start, end), end - start, out)
            return
        slots = self._slots(block_table, start, end)
        self._kernels.gather_kv(self.layers, slots, self._wire(out, end - start))

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a segment in wire order to tokens ``[start, end)``; the inverse of ``gather``."""
        self._check(block_table, end)
        if self._rows is not None:
            self._rows.write(self._runs(block_table, start, end), end - start, segment)
            return
        slots = self._slots(block_table, start, end)
        self._kernels.scatter_kv(self.layers, slots, self._wire(segment, end - start))

    def _allocate(self) -> list[PagedKV]:
        layers, dtype = self.layout.layers, self.layout.dtype
        shapes: list[tuple[int, ...]] = [
            (self.block_size, layer.num_kv_heads, head_dim)
            for layer in layers
            for head_dim in (layer.k_head_dim, layer.v_head_dim)
        ]
        sides = self._tensors(shapes, dtype)
        scales: Sequence[Tensor | None] = [None] * len(sides)
        if dtype in QUANTISED_LIMITS:
            shapes = [(layer.num_kv_heads, self.block_size) for layer in layers for _ in range(2)]
            scales = self._tensors(shapes, _SCALE_DTYPE)
        each = zip(sides[::2], sides[1::2], scales[::2], scales[1::2], strict=True)
        return [PagedKV(*of_layer) for of_layer in each]

    def _tensors(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """``[num_blocks, *shape]`` for each shape; one allocation for all that have the same."""
        together = self._kernels.keeps_blocks_together
        stack = self._stack_in_blocks if together else self._stack
        stacks = {shape: iter(stack(n, shape, dtype)) for shape, n in Counter(shapes).items()}
        return [next(stacks[shape]) for shape in shapes]

    def _stack_in_blocks(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Sequence[Tensor]:
        """Tensors that lie side by side in each block, since a hand-off moves whole blocks."""
        return self._empty((self.num_blocks, count, *shape), dtype).unbind(1)

    def _stack(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Sequence[Tensor]:
        """Tensors one after the other, each where Triton kernels want a tensor to begin."""
        size = self.num_blocks * math.prod(shape)
        padded = size + -size % (_ALIGNMENT // dtype.itemsize)
        rows = self._empty((count, padded), dtype)
        return [row[:size].view(self.num_blocks, *shape) for row in rows]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _check(self, block_table: Sequence[int], end: int) -> None:
        if end > len(block_table) * self.block_size:
            raise IndexError(
                f"token {end - 1} is beyond the {len(block_table)} blocks of its table"
            )

    def _runs(self, block_table: Sequence[int], start: int, end: int) -> Iterator[Run]:
        return find_runs(block_table, self.block_size, start, end)

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        # Of the blocks concerned alone: a table may be much longer than a segment.
        size = self.block_size
        first = start // size
        blocks = torch.tensor(block_table[first : -(-end // size)])
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()[start - first * size :]
        return slots[: end - start].to(self.device)

    def _wire(self, segment: Tensor, num_tokens: int) -> WireKV:
        num_scale_bytes = self._num_scale_bytes * num_tokens
        if not num_scale_bytes:
            return WireKV(segment.view(self.layout.wire_dtype))
        elements = segment[num_scale_bytes:].view(self.layout.wire_dtype)
        return WireKV(elements, segment[:num_scale_bytes].view(_SCALE_DTYPE))
