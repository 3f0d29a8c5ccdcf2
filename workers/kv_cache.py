"""The tensors behind the block ids, and their canonical form on the wire.

The wire carries ``[layers, 2, tokens, kv_heads, head_dim]``: neither block size nor block order
leaks to the other side. Layers may differ in heads and widths, and K may differ from V; then the
same order holds with each layer's own shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """KV shape of a model."""

    layers: tuple[LayerLayout, ...]
    dtype: torch.dtype

    @property
    def num_bytes_per_token(self) -> int:
        """K and V of all layers."""
        return sum(layer.num_elements for layer in self.layers) * self.dtype.itemsize


class KVCache:
    """Owns K and V of every block.

    Args:
        layout: Shapes and dtype.
        num_blocks: Blocks in each layer.
        block_size: Tokens per block.
        device: Where the tensors live. Memory is committed by the operating system on first use.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.num_bytes_per_token = layout.num_bytes_per_token
        # One tensor per layer and side, [num_blocks, block_size, num_kv_heads, head_dim].
        self.keys = [self._empty(layer, layer.k_head_dim) for layer in layout.layers]
        self.values = [self._empty(layer, layer.v_head_dim) for layer in layout.layers]

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        """Copy KV of tokens ``[start, end)`` into wire order.

        Args:
            block_table: Of the request, from its first token.
            start: First token.
            end: One past the last token.
            out: uint8 ``[num_bytes_per_token * (end - start)]``, contiguous, on the CPU.
        """
        slots = self._slots(block_table, start, end)
        for cache, part in self._wire_parts(out, end - start):
            if self.device.type == "cpu":
                torch.index_select(cache, 0, slots, out=part)
            else:
                part.copy_(cache.index_select(0, slots))

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a segment in wire order to tokens ``[start, end)``; the inverse of ``gather``."""
        slots = self._slots(block_table, start, end)
        for cache, part in self._wire_parts(segment, end - start):
            cache.index_copy_(0, slots, part.to(self.device))

    def _empty(self, layer: LayerLayout, head_dim: int) -> Tensor:
        shape = (self.num_blocks, self.block_size, layer.num_kv_heads, head_dim)
        return torch.empty(shape, dtype=self.layout.dtype, device=self.device)

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)[positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).to(self.device)

    def _wire_parts(self, wire: Tensor, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Pair every cache tensor, as ``[slots, heads, dim]``, with its place in the segment."""
        elements = wire.view(self.layout.dtype)
        pairs = []
        offset = 0
        for keys, values in zip(self.keys, self.values, strict=True):
            for cache in (keys, values):
                shape = (num_tokens, *cache.shape[2:])
                size = shape[0] * shape[1] * shape[2]
                pairs.append(
                    (cache.view(-1, *cache.shape[2:]), elements[offset : offset + size].view(shape))
                )
                offset += size
        return pairs
