"""The set of Triton ops of one pool on one architecture."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from antiphon.errors import ConfigError
from antiphon.kernels import rms_norm as norms
from antiphon.kernels import silu_and_mul as gates
from antiphon.kernels import write_kv as writing
from antiphon.kernels.attention_batch import (
    AttentionBatch,
    AttentionFeatures,
    KernelPlan,
    pack_batch,
)
from antiphon.kernels.decode_attention import decode_attention
from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode
from antiphon.kernels.gather_kv import SideTable, gather_kv, make_side_tables
from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.launch import padded_dim
from antiphon.kernels.paged_kv import PagedKV, WireKV
from antiphon.kernels.prefill_attention import prefill_attention
from antiphon.kernels.prefill_plan import plan_prefill
from antiphon.kernels.scatter_kv import scatter_kv
from antiphon.kernels.tuning import (
    FLOAT32_OVER_LESS,
    AttentionConfigs,
    Role,
    Tuning,
    tuning_for,
)


def make_triton_kernels(device: torch.device, role: Role) -> "TritonKernels":
    """Build the set for a GPU.

    Raises:
        ConfigError: Nothing is tuned for its architecture.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        target = properties.gcnArchName.split(":")[0]
    else:
        target = f"sm_{properties.major}{properties.minor}"
    return TritonKernels(tuning_for(target, role), properties.multi_processor_count)


class TritonKernels:
    """See ``KernelSet``.

    Args:
        tuning: Of the pool and architecture.
        num_sms: Multiprocessors of the device.
    """

    captures_graphs = True
    keeps_blocks_together = False
    write_kv = staticmethod(writing.write_kv)
    rms_norm = staticmethod(norms.rms_norm)
    add_rms_norm = staticmethod(norms.add_rms_norm)
    silu_and_mul = staticmethod(gates.silu_and_mul)

    def __init__(self, tuning: Tuning, num_sms: int) -> None:
        self._tuning = tuning
        self._num_sms = num_sms
        self._configs: AttentionConfigs | None = None
        self._capacity: DecodeCapacity | None = None
        self._side_tables: dict[int, tuple[SideTable, ...]] = {}

    def prepare(self, shape: AttentionShape) -> None:
        """Choose configurations for a model and the dtypes of it and its cache.

        Raises:
            ConfigError: The architecture has no configuration for them.
        """
        if shape.cache_dtype == torch.float8_e4m3fn and self._tuning.target == "sm_80":
            raise ConfigError(
                "engine.kv_cache_dtype: got fp8, which sm_80 cannot convert; use int8"
            )
        self._configs = self._configs_for(shape)
        decode, shared = self._configs.decode, self._configs.shared_prefix
        resident = self._num_sms * decode.min_ctas_per_sm
        self._capacity = DecodeCapacity(
            num_items=max(1, resident // shape.num_kv_heads),
            block_n=decode.block_n,
            members_per_item=max(1, shared.block_m // shape.group),
            shared_prefix_min_tokens=self._tuning.shared_prefix_min_tokens,
        )

    def _configs_for(self, shape: AttentionShape) -> AttentionConfigs:
        head_dim = max(64, padded_dim(shape.head_dim))
        if shape.dtype != torch.float32 or shape.cache_dtype == torch.float32:
            return self._tuning.attention((head_dim, shape.cache_dtype.itemsize * 8))
        if head_dim > 64:
            raise ConfigError(
                "engine.kv_cache_dtype: no attention is tuned for a float32 model with heads of "
                f"{head_dim} and a smaller cache; set model.dtype: bfloat16, or leave it at auto"
            )
        return FLOAT32_OVER_LESS

    def make_batch(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Lay out a packed batch and plan its launches."""
        assert self._configs is not None, "prepare() comes first"
        assert self._capacity is not None
        batch = pack_batch(tables, starts, counts, block_size, device)
        num_decode, seq_lens = batch.num_decode_requests, batch.seq_lens
        prefill = decode = None
        if num_decode:
            decode = plan_decode(
                seq_lens[:num_decode], tables[:num_decode], block_size, self._capacity, device
            )
        if num_decode < len(counts):
            block_m = self._configs.prefill.block_m
            prefill = plan_prefill(
                counts[num_decode:], seq_lens[num_decode:], num_decode, block_m, device
            )
        plan = KernelPlan(
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor(batch.cu_seqlens_q, dtype=torch.int32, device=device),
            prefill=prefill,
            decode=decode,
        )
        return replace(batch, plan=plan)

    def paged_attention(
        self, query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
    ) -> Tensor:
        """Decode requests first, then the others."""
        configs = self._configs
        assert configs is not None, "prepare() comes first"
        plan, num_decode = batch.plan, batch.num_decode_requests
        decode = prefill = None
        if num_decode:
            decode = decode_attention(
                query[:num_decode], kv, batch, features, configs.decode, configs.shared_prefix
            )
        if plan is not None and plan.prefill is not None:
            prefill = prefill_attention(query[num_decode:], kv, batch, features, configs.prefill)
        if decode is None or prefill is None:
            out = prefill if decode is None else decode
            assert out is not None, "an empty batch"
            return out
        return torch.cat([decode, prefill])

    def gather_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Cache to wire, all layers of a shape in one launch."""
        gather_kv(layers, slots, wire, self._tables_of(layers))

    def scatter_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        """Wire to cache, all layers of a shape in one launch."""
        scatter_kv(layers, slots, wire, self._tables_of(layers))

    def _tables_of(self, layers: Sequence[PagedKV]) -> tuple[SideTable, ...]:
        key = layers[0].keys.data_ptr()
        if key not in self._side_tables:  # one cache for the life of a worker
            self._side_tables = {key: make_side_tables(layers)}
        return self._side_tables[key]
