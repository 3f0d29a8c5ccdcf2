"""Turns a scheduled batch into tensors, runs the model, and samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from antiphon.kernels.attention_batch import make_attention_batch
from antiphon.messages import SamplingParams
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.paged_model import ForwardBatch, PagedModel
from antiphon.workers.sampler import sample


@dataclass(frozen=True, slots=True)
class ModelRunner:
    """Stateless between steps: all state is in the requests and the cache."""

    model: PagedModel
    cache: KVCache

    def run(self, batch: Batch, is_abandoned: Callable[[], bool] = lambda: False) -> list[int]:
        """Compute a batch.

        Returns:
            One sampled token for each chunk with ``samples``, in the batch's order.

        Raises:
            StepAbandonedError: ``is_abandoned`` became true in mid-step.
        """
        # Attention wants requests with one new token first, by rising length.
        chunks = sorted(batch.chunks, key=_packing_order)
        forward, sampling = self._pack(chunks)
        logits = self.model.forward(forward, self.cache, is_abandoned)
        positions = [c.request.num_tokens for c in chunks if c.samples]
        drawn = sample(logits, sampling, positions) if sampling else []
        sampled = [chunk.request.request_id for chunk in chunks if chunk.samples]
        tokens = dict(zip(sampled, drawn, strict=True))
        return [tokens[c.request.request_id] for c in batch.chunks if c.samples]

    def _pack(self, chunks: list[Chunk]) -> tuple[ForwardBatch, list[SamplingParams]]:
        device = self.model.device
        input_ids: list[int] = []
        position_ids: list[int] = []
        logit_rows: list[int] = []
        sampling: list[SamplingParams] = []
        for chunk in chunks:
            end = chunk.start + chunk.num_tokens
            input_ids += chunk.request.tokens(chunk.start, end)
            position_ids += range(chunk.start, end)
            if chunk.samples and chunk.request.sampling is not None:
                logit_rows.append(len(input_ids) - 1)
                sampling.append(chunk.request.sampling)
        attention = make_attention_batch(
            [chunk.request.block_table for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.num_tokens for chunk in chunks],
            self.cache.block_size,
            device,
        )
        forward = ForwardBatch(
            input_ids=torch.tensor([input_ids], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
            attention=attention,
        )
        return forward, sampling


def _packing_order(chunk: Chunk) -> tuple[bool, int]:
    return chunk.num_tokens > 1, chunk.start
