"""What a step says to those whose requests it computed: new tokens, and what the first one took."""

from collections.abc import Mapping, Sequence

from antiphon.messages import RequestOutput
from antiphon.request_timing import RequestTiming
from antiphon.workers.batch import Batch


def first_token_timings(batch: Batch, began_at: float, now: float) -> dict[str, RequestTiming]:
    """Account for the first tokens of a step by request; before the scheduler records the step."""
    return {
        chunk.request.request_id: chunk.request.timeline.timing(
            chunk.request.path, (began_at, now), computes_prompt=chunk.num_tokens > 1
        )
        for chunk in batch.chunks
        if chunk.samples and not chunk.request.output_token_ids
    }


def step_outputs(
    batch: Batch, token_ids: Sequence[int], timings: Mapping[str, RequestTiming]
) -> list[RequestOutput]:
    """Say what was sampled; after the scheduler recorded the step, which may end requests.

    Args:
        batch: That was computed.
        token_ids: One per chunk that samples, in order.
        timings: Of first tokens, by request.
    """
    sampled = [chunk.request for chunk in batch.chunks if chunk.samples]
    return [
        RequestOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            timing=timings.get(request.request_id),
        )
        for request, token_id in zip(sampled, token_ids, strict=True)
    ]
