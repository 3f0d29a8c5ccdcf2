"""Before a worker serves it has done everything once, since a GPU's kernels are compiled then."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.paged_kv import PagedKV, WireKV
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.paged_model import PagedModel


class NotingKernels(TorchKernels):
    """The torch ops; notes what a GPU would compile late."""

    keeps_blocks_together = False  # where bytes move without an op

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def paged_attention(
        self, query: Tensor, kv: PagedKV, batch: AttentionBatch, features: AttentionFeatures
    ) -> Tensor:
        counts = torch.tensor(batch.cu_seqlens_q).diff().tolist()
        self.ops.append(f"attention of {counts}")
        return super().paged_attention(query, kv, batch, features)

    def gather_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        self.ops.append("gather")
        super().gather_kv(layers, slots, wire)

    def scatter_kv(self, layers: Sequence[PagedKV], slots: Tensor, wire: WireKV) -> None:
        self.ops.append("scatter")
        super().scatter_kv(layers, slots, wire)


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_stream_a_prompt_and_both_ends_of_a_hand_off(block_size: int) -> None:
    kernels = NotingKernels()
    model = PagedModel(tiny_model("llama"), kernels)
    cache = KVCache(model.layout, 2, block_size, torch.device("cpu"), kernels)
    ModelRunner(model, cache).warm_up()
    assert kernels.ops == ["attention of [1, 2]"] * len(cache.layers) + ["gather", "scatter"]
