"""The ops that a worker runs: one set for the CPU, one for each pool and GPU architecture.

``selection`` is the one place that picks. The engine calls the set it was given and never asks
what is behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.paged_kv import PagedKV, Rotary, WireKV


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of a model decides which configuration its attention takes.

    Attributes:
        num_kv_heads: Of the layer with most.
        group: Query heads of a KV head, of the layer with most.
        head_dim: The widest.
        dtype: Of the queries.
        cache_dtype: Of K and V.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype


class KernelSet(Protocol):
    """What the engine calls. Shapes are documented once, at the ops in ``reference``."""

    captures_graphs: bool
    """Whether a decode step reads nothing but tensors, so that a CUDA graph can replay it."""

    keeps_blocks_together: bool
    """Whether the ops take caches whose blocks keep K and V of all layers side by side."""

    def prepare(self, shape: AttentionShape) -> None:
        """Choose configurations for a model; before the first batch."""
        ...

    def make_batch(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Lay out a packed batch; requests with one new token come first, by rising length."""
        ...

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: PagedKV,
        slot_mapping: Tensor,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values; return the queries."""
        ...

    def paged_attention(
        self, query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
    ) -> Tensor:
        """Attend from every new token of a packed batch to its request's context."""
        ...

    def gather_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Copy KV of cache slots into wire order."""
        ...

    def scatter_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Copy KV in wire order to cache slots."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
        """Normalise the last dimension and scale it."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Add, then normalise the sum; returns the normalised sum, and the sum."""
        ...

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """``silu(first half) * second half`` of the last dimension."""
        ...
