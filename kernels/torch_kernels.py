"""The set of torch ops, which runs on any device: the CPU path, and what GPU kernels must equal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from antiphon.kernels import reference
from antiphon.kernels.attention_batch import (
    AttentionBatch,
    AttentionFeatures,
    make_attention_batch,
)
from antiphon.kernels.block_rows import SideRows, make_side_rows
from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.paged_kv import PagedKV, WireKV


class TorchKernels:
    """See ``KernelSet``; every op is the reference."""

    captures_graphs = False
    write_kv = staticmethod(reference.write_kv)
    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    silu_and_mul = staticmethod(reference.silu_and_mul)

    def __init__(self) -> None:
        self._rows: dict[int, tuple[SideRows, ...]] = {}

    def prepare(self, shape: AttentionShape) -> None:
        """Nothing is tuned here."""

    def make_batch(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Lay out a packed batch."""
        return make_attention_batch(tables, starts, counts, block_size, device)

    def paged_attention(
        self, query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
    ) -> Tensor:
        """Decode requests first, then the others."""
        num_decode = batch.num_decode_requests
        if num_decode == len(batch.seq_lens):
            return reference.decode_attention(query, kv, batch, features)
        prefill = reference.prefill_attention(query[num_decode:], kv, batch, features)
        if num_decode == 0:
            return prefill
        decode = reference.decode_attention(query[:num_decode], kv, batch, features)
        return torch.cat([decode, prefill])

    def gather_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Cache to wire."""
        reference.gather_kv(layers, slots, wire, self._rows_of(layers))

    def scatter_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Wire to cache."""
        reference.scatter_kv(layers, slots, wire, self._rows_of(layers))

    def _rows_of(self, layers: Sequence[PagedKV]) -> tuple[SideRows, ...] | None:
        key = layers[0].keys.data_ptr()
        if (rows := self._rows.get(key)) is not None:
            return rows
        if layers[0].keys.device.type != "cpu":
            return None
        self._rows = {key: make_side_rows(layers)}  # one cache for the life of a worker
        return self._rows[key]
