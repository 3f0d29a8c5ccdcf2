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
from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.paged_kv import PagedKV


class TorchKernels:
    """See ``KernelSet``; every op is the reference."""

    captures_graphs = False
    keeps_blocks_together = True
    write_kv = staticmethod(reference.write_kv)
    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    silu_and_mul = staticmethod(reference.silu_and_mul)
    gather_kv = staticmethod(reference.gather_kv)
    scatter_kv = staticmethod(reference.scatter_kv)

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
