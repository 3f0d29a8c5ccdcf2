"""Decode steps captured as CUDA graphs, one for each batch size that is a bucket.

A step of a small batch is bound by launching hundreds of kernels, not by running them; a graph
launches them at once. Everything a captured step reads lies in static tensors: a replay copies the
new step's tensors over them, pads the batch with requests that have no context and no slot, and
throws their logits away. Steps that hold prompt tokens run eagerly, as does every step if the model
cannot be captured (for example because its experts wait for the device to count their tokens).
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from antiphon.workers.forward_batch import ForwardBatch

logger = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


def graph_buckets(max_num_requests: int) -> tuple[int, ...]:
    """Batch sizes worth a graph: powers of two up to 16, then multiples of 16, and the largest."""
    small = [size for size in (1, 2, 4, 8) if size < max_num_requests]
    return (*small, *range(16, max_num_requests, 16), max_num_requests)


def cuda_graph_capture() -> Capture:
    """Capture steps on the current device into one pool of memory.

    They may share it because they run one at a time, and what a replay returns is used up before
    the next one. A pool for each would hold activations as often as there are graphs. Logits are
    held for each all the same: what a replay returns is where its graph writes.
    """
    pool = torch.cuda.graph_pool_handle()
    # One for all: cuBLAS keeps a workspace for each stream that it has seen, 32 MiB on Hopper.
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return lambda step: _capture(step, pool, stream)


def _capture(
    step: Callable[[], Tensor], pool: "torch.cuda._POOL_HANDLE", stream: torch.cuda.Stream
) -> Replay:
    """Capture a step after two runs on a stream, which compile and warm up."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class DecodeGraphs:
    """Captured steps by bucket.

    Args:
        step: Runs the model on a batch and returns its logits.
        make_batch: Builds the batch of a bucket from no requests at all: padding only.
        buckets: Batch sizes, rising.
        capture: Makes a step replayable; of ``cuda_graph_capture``.
    """

    def __init__(
        self,
        step: Callable[[ForwardBatch], Tensor],
        make_batch: Callable[[int], ForwardBatch],
        buckets: tuple[int, ...],
        capture: Capture,
    ) -> None:
        self.num_replays = 0
        self._captured: dict[int, tuple[ForwardBatch, Replay]] = {}
        for bucket in reversed(buckets):  # the largest first: the others reuse its memory
            static = make_batch(bucket)
            self._captured[bucket] = static, capture(partial(step, static))
        self._buckets = buckets

    def bucket(self, num_requests: int) -> int | None:
        """The smallest captured batch that holds so many requests."""
        return next((bucket for bucket in self._buckets if bucket >= num_requests), None)

    def run(self, batch: ForwardBatch, num_requests: int) -> Tensor:
        """Replay a step.

        Args:
            batch: Decode requests only, padded to a bucket.
            num_requests: Without the padding.

        Returns:
            Logits ``[num_requests, vocab_size]``; valid until the next replay.
        """
        static, replay = self._captured[batch.input_ids.shape[1]]
        static.copy_(batch)
        self.num_replays += 1
        return replay()[:num_requests]
