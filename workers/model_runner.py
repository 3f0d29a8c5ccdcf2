"""Turns a scheduled batch into tensors, runs the model, and samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from antiphon.kernels.kernel_set import AttentionShape
from antiphon.messages import SamplingParams
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.decode_graphs import Capture, DecodeGraphs
from antiphon.workers.forward_batch import ForwardBatch
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.sampler import sample


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens of one request in a packed step; a row without blocks pads a captured graph."""

    block_table: Sequence[int] = ()
    start: int = -1
    token_ids: Sequence[int] = (0,)


class ModelRunner:
    """Stateless between steps: all state is in the requests and the cache.

    Args:
        model: Computes.
        cache: Holds KV.

    Raises:
        ConfigError: The kernels have no configuration for the model and its cache.
    """

    def __init__(self, model: PagedModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.graphs: DecodeGraphs | None = None
        layers = cache.layout.layers
        model.kernels.prepare(
            AttentionShape(
                num_kv_heads=max(layer.num_kv_heads for layer in layers),
                # Some families have fewer KV heads in some layers, each with more query heads.
                group=model.num_q_heads // min(layer.num_kv_heads for layer in layers),
                head_dim=max(max(layer.k_head_dim, layer.v_head_dim) for layer in layers),
                dtype=model.layout.dtype,
                cache_dtype=cache.layout.dtype,
            )
        )

    def warm_up(self) -> None:
        """Do every kind of work once, so that its kernels are compiled before anybody waits.

        Writes to the first two blocks, which hold nothing yet.
        """
        rows = [_Row((0, 1), 0), _Row((0, 1), 0, (0, 0))]  # a decode step and a prompt
        self.model.forward(self._pack(rows, range(2)), self.cache, lambda: False)
        wire = torch.empty(
            self.cache.num_bytes_per_token, dtype=torch.uint8, device=self.model.device
        )
        self.cache.gather((0,), 0, 1, wire)
        self.cache.scatter((0,), 0, 1, wire)
        self.settle()

    def capture_graphs(self, buckets: tuple[int, ...], capture: Capture) -> None:
        """Capture decode steps of these batch sizes; takes seconds each."""

        def pack_padding(bucket: int) -> ForwardBatch:
            widest = [0] * -(-self.model.max_context_tokens // self.cache.block_size)
            padding = [_Row()] * (bucket - 1)
            return self._pack([_Row(widest), *padding], range(bucket))

        def step(batch: ForwardBatch) -> Tensor:
            return self.model.forward(batch, self.cache, lambda: False)

        self.graphs = DecodeGraphs(step, pack_padding, buckets, capture)

    @property
    def num_graph_steps(self) -> int:
        """Steps replayed so far."""
        return 0 if self.graphs is None else self.graphs.num_replays

    def run(self, batch: Batch, is_abandoned: Callable[[], bool] = lambda: False) -> list[int]:
        """Compute a batch; returns when the device has done so.

        Returns:
            One sampled token for each chunk with ``samples``, in the batch's order.

        Raises:
            StepAbandonedError: ``is_abandoned`` became true in mid-step.
        """
        # Attention wants requests with one new token first, by rising length.
        chunks = sorted(batch.chunks, key=_packing_order)
        sampling = [c for c in chunks if c.samples and c.request.sampling is not None]
        logits = self._logits(chunks, is_abandoned)
        drawn = _sample(logits, sampling) if sampling else []
        if not sampling:  # nothing was read, so all of it may still be queued
            self.settle()
        tokens = {c.request.request_id: t for c, t in zip(sampling, drawn, strict=True)}
        return [tokens[c.request.request_id] for c in batch.chunks if c.samples]

    def settle(self) -> None:
        """Wait for all that steps have queued on the device; on the thread that calls ``run``.

        A step that samples waits by reading what was drawn, one that does not by this, or its time
        would be that of launching it. After a step that was abandoned or has failed, kernels may
        still be to come that write KV: whoever lets another stream write to blocks that were freed
        calls this first. Graphs are replayed on the same stream. On a CPU nothing is queued. On a
        GPU little is lost: the next step's inputs are copied from pageable memory, which waits for
        the stream as well.
        """
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _logits(self, chunks: list[Chunk], is_abandoned: Callable[[], bool]) -> Tensor:
        rows = [
            _Row(c.request.block_table, c.start, c.request.tokens(c.start, c.start + c.num_tokens))
            for c in chunks
        ]
        bucket = None
        if self.graphs is not None and all(c.num_tokens == 1 and c.samples for c in chunks):
            bucket = self.graphs.bucket(len(chunks))
        if self.graphs is not None and bucket is not None:
            rows += [_Row()] * (bucket - len(rows))
            return self.graphs.run(self._pack(rows, range(bucket)), len(chunks))
        sampled = [i for i, c in enumerate(chunks) if c.samples and c.request.sampling is not None]
        return self.model.forward(self._pack(rows, sampled), self.cache, is_abandoned)

    def _pack(self, rows: Sequence[_Row], sampled: Sequence[int]) -> ForwardBatch:
        """Lay out rows; the last token of each of ``sampled`` gets logits."""
        device = self.model.device
        input_ids: list[int] = []
        position_ids: list[int] = []
        last_tokens: list[int] = []
        for row in rows:
            input_ids += row.token_ids
            start = max(row.start, 0)
            position_ids += range(start, start + len(row.token_ids))
            last_tokens.append(len(input_ids) - 1)
        attention = self.model.kernels.make_batch(
            [row.block_table for row in rows],
            [row.start for row in rows],
            [len(row.token_ids) for row in rows],
            self.cache.block_size,
            device,
        )
        return ForwardBatch(
            input_ids=torch.tensor([input_ids], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            logit_rows=torch.tensor([last_tokens[i] for i in sampled], dtype=torch.int64).to(
                device
            ),
            attention=attention,
        )


def _sample(logits: Tensor, chunks: list[Chunk]) -> list[int]:
    parameters: list[SamplingParams] = []
    for chunk in chunks:
        assert chunk.request.sampling is not None
        parameters.append(chunk.request.sampling)
    return sample(logits, parameters, [chunk.request.num_tokens for chunk in chunks])


def _packing_order(chunk: Chunk) -> tuple[bool, int]:
    return chunk.num_tokens > 1, chunk.start
