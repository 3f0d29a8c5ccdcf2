"""A scheduler, requests for it, and steps that compute nothing."""

from typing import Any

from antiphon.messages import SamplingParams
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.scheduler import Scheduler, SchedulerConfig


def make(num_blocks: int = 16, block_size: int = 4, **config: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), BlockPool(num_blocks, block_size))


def request(
    request_id: str, num_prompt: int, max_tokens: int = 4, path: PrefillPath = PrefillPath.LOCAL
) -> Request:
    """Those whose names begin alike have prompts that begin alike."""
    prompt = [ord(request_id[0])] * num_prompt
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens), path)


def prefill(request_id: str, num_prompt: int) -> Request:
    """All of them begin alike."""
    return Request(request_id, [7] * num_prompt, None)


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule and complete; return who got how many tokens."""
    batch = scheduler.schedule()
    if batch is None:
        return []
    scheduler.complete(batch, [9] * sum(c.samples for c in batch.chunks), now=0.0)
    return [(chunk.request.request_id, chunk.num_tokens) for chunk in batch.chunks]
