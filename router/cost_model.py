"""Predicted seconds from choosing workers to the first token.

    pair   queue on P + uncached tokens / P's rate + handoff + wait on D
    local  queue on D + uncached tokens / D's rate           + wait on D

The sum ignores that a long prompt's transfer overlaps its computation: transfer is a few per cent
of prefill, and the error is the same for every pair. Charges are seconds too, but they are for what
others pay (streams that a prompt stalls) or for a risk (no place until streams end): they rank
workers and are not part of the prediction.
"""

from dataclasses import dataclass

from antiphon.messages import Load


@dataclass(frozen=True, slots=True)
class CostParameters:
    """The constants of the prediction."""

    # Of a worker that has not computed anything yet. Both are a small CPU worker's: too slow rather
    # than too fast, so that a fresh worker is tried without being flooded.
    default_prefill_tokens_per_second: float = 1000.0
    default_decode_step_seconds: float = 0.05
    # What a handoff costs beside its bytes: asking P, the link's round trips, the scatter.
    handoff_seconds: float = 0.01
    link_bytes_per_second: float = 1.5e9
    # Growth of a decode step with each stream beside the request, as a share of the step. 30 layers
    # of 576 on one CPU core: 0.12 up to 8 streams, 0.09 up to 32. The step that a worker measured
    # before it became idle is out of date, and this term is what still tells it from a busy one.
    stream_slowdown: float = 0.1
    # Charge for each second of prompt computation beside each running stream. 1 would say that the
    # streams stand still meanwhile; chunked prefill slows them down instead.
    stall_weight: float = 0.25
    # Charge for a worker without room for the prompt: about how long a stream holds its blocks.
    # Nobody reports how long streams last.
    full_seconds: float = 5.0
    # Predictions closer than this share of the best are equal: their inputs are no more exact.
    tie_ratio: float = 0.1


class CostModel:
    """The prediction's terms, each in seconds."""

    def __init__(self, parameters: CostParameters) -> None:
        self.parameters = parameters

    def prefill_seconds(self, load: Load, num_queued_tokens: int, num_tokens: int) -> float:
        """Predict how long ``num_tokens`` take a worker behind ``num_queued_tokens`` others."""
        rate = load.prefill_tokens_per_second or self.parameters.default_prefill_tokens_per_second
        return (num_queued_tokens + num_tokens) / rate

    def handoff_seconds(self, num_tokens: int, wire_bytes_per_token: int) -> float:
        """Predict the movement of the KV of ``num_tokens`` over a link."""
        parameters = self.parameters
        num_bytes = num_tokens * wire_bytes_per_token
        return parameters.handoff_seconds + num_bytes / parameters.link_bytes_per_second

    def wait_seconds(self, load: Load, num_streams: int) -> float:
        """Predict the first decode step beside ``num_streams`` others.

        Each that waits counts as a step, which only ranks workers that have no room: it waits for
        a stream to end, and ``room_seconds`` charges for that.
        """
        step = load.decode_step_seconds or self.parameters.default_decode_step_seconds
        return step * (1 + load.num_waiting + self.parameters.stream_slowdown * num_streams)

    def stall_seconds(self, load: Load, num_tokens: int) -> float:
        """Charge for slowing a worker's running streams down with ``num_tokens`` of prompt."""
        weight = self.parameters.stall_weight * load.num_running
        return weight * self.prefill_seconds(load, 0, num_tokens)

    def room_seconds(self, load: Load, num_unseen_blocks: int, num_prompt_blocks: int) -> float:
        """Charge for a worker on which streams have to end before it can take the prompt.

        Workers report after they have admitted all that fits, so whoever waits in a report found no
        place, and a prompt sent now stands behind, however small. All its blocks count: what is
        cached of it is among the free ones until it takes them. A worker keeps a block free for
        each request that it has, to grow into.
        """
        num_free = load.num_free_blocks - load.num_running - num_unseen_blocks
        is_full = load.num_waiting or num_prompt_blocks > num_free
        return self.parameters.full_seconds if is_full else 0.0
