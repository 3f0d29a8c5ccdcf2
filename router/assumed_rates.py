"""What a router assumes of a worker whose rates nobody measured, or that were measured long ago.

    measured lately, or busy with it   what the worker says
    never measured                     what the typical one of its peers says, which have its role
    measured long ago                  the same, if it is better

A rate is measured by working. Without this, who has not worked yet counts as slow as the default,
and who was slow once, in a first step or while the machine did something else, as slow as it was
then: neither is given work while its peers are better, so neither is ever measured. A worker that
really is slower than its peers is found out again at each trial, once in ``_OLD_SECONDS``; of
prompts beside many streams a trial has to be long enough to be a measurement (``engine_stats``).

Each kind of work speaks for itself: streams measure steps, and nothing of how fast prompts are.
What makes up a step (its base, each stream's part, a full one) is learned from the same steps, and
is taken from the same peer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from antiphon.messages import Load

_OLD_SECONDS = 10.0


@dataclass(slots=True)
class MeasuredRates:
    """One worker's rates as it reported them, and whose are assumed in their place."""

    load: Load
    prefill_at: float  # when its rate changed, so when it was measured
    decode_at: float
    prefills_like: Load | None = None
    decodes_like: Load | None = None

    def report(self, load: Load, now: float) -> Load:
        """Take in a report; return it with what is assumed."""
        if load.prefill_tokens_per_second != self.load.prefill_tokens_per_second:
            self.prefill_at, self.prefills_like = now, None
        if load.decode_step_seconds != self.load.decode_step_seconds:
            self.decode_at, self.decodes_like = now, None
        self.load = load
        return self.believed()

    def knows_prefill(self, now: float) -> bool:
        """Whether its rate tells of now; who has prompts and measures nothing is slow indeed."""
        return self.load.num_queued_tokens > 0 or now - self.prefill_at < _OLD_SECONDS

    def knows_decode(self, now: float) -> bool:
        """The same of its steps."""
        return self._is_busy or now - self.decode_at < _OLD_SECONDS

    def believed(self) -> Load:
        """The last report, with what is assumed."""
        load = self.load
        if peer := self.prefills_like:
            load = replace(load, prefill_tokens_per_second=peer.prefill_tokens_per_second)
        if peer := self.decodes_like:
            load = replace(load, decode_step_seconds=peer.decode_step_seconds)
            if not self._is_busy:  # or it learns these in steps with prompt tokens
                load = replace(
                    load,
                    decode_base_seconds=peer.decode_base_seconds,
                    decode_stream_seconds=peer.decode_stream_seconds,
                    prompt_gap_seconds=peer.prompt_gap_seconds,
                    prompt_gap_tokens=peer.prompt_gap_tokens,
                )
        return load

    @property
    def _is_busy(self) -> bool:
        return self.load.num_running > 0 or self.load.num_waiting > 0


def assume(peers: Iterable[MeasuredRates], now: float) -> None:
    """Decide anew what is assumed of workers of one role."""
    peers = tuple(peers)
    loads = [each.load for each in peers]
    prefills = _models(loads, [each.knows_prefill(now) for each in peers], _token_seconds)
    decodes = _models(loads, [each.knows_decode(now) for each in peers], _step_seconds)
    for each, prefill, decode in zip(peers, prefills, decodes, strict=True):
        each.prefills_like, each.decodes_like = prefill, decode


def _models(
    loads: Sequence[Load], are_valid: Sequence[bool], cost: Callable[[Load], float]
) -> list[Load | None]:
    """For each load, the one to go by instead, if any."""
    pairs = tuple(zip(loads, are_valid, strict=True))
    known = [load for load in loads if cost(load)]
    candidates = [load for load, is_valid in pairs if is_valid and cost(load)] or known
    if not candidates:
        return [None] * len(loads)
    # The median; of two in the middle the better one, or the other would never be tried again.
    typical = sorted(candidates, key=cost)[(len(candidates) - 1) // 2]
    limit = cost(typical)
    return [
        None if cost(load) and (is_valid or cost(load) <= limit) else typical
        for load, is_valid in pairs
    ]


def _token_seconds(load: Load) -> float:
    """Of a prompt; 0 if that was never measured."""
    rate = load.prefill_tokens_per_second
    return 1 / rate if rate else 0.0


def _step_seconds(load: Load) -> float:
    return load.decode_step_seconds
