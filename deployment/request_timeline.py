"""What an ingress tells of one request, open or ended: where its time went, and at whose hands.

Seconds are durations, or count from the request's arrival at the ingress. There are no prompts and
no tokens in it, only how many.
"""

import msgspec

from antiphon.deployment.journey import Attempt, Journey
from antiphon.request_timing import FailedPrefill, RemotePrefill


class AttemptTimeline(msgspec.Struct, frozen=True):
    """One decode worker that was asked."""

    worker: str  # replica id, as all workers here
    role: str
    node: str
    reason: str  # as in antiphon_router_decisions_total
    prefill: str | None  # the prefill worker that was chosen with it
    predicted_ttft_seconds: float
    sent_at: float
    ended_at: float | None
    failure: str | None  # busy, draining, lost, moved or invalid


class ChoiceTimeline(msgspec.Struct, frozen=True):
    """One choice of a request."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: str | None
    path: str | None  # who computed the prompt: local, remote or fallback; None: nobody yet
    ttft_seconds: float | None
    tpot_seconds: float | None
    longest_gap_seconds: float  # between two outputs
    last_token_at: float | None
    parts: dict[str, float]  # of ttft_seconds, in order; they add up to it
    remote: RemotePrefill | None
    failed_prefills: tuple[FailedPrefill, ...]
    attempts: list[AttemptTimeline]


class RequestTimeline(msgspec.Struct, frozen=True):
    """One HTTP request."""

    request_id: str
    ingress: str  # replica id
    trace_id: str | None  # where it is sampled
    path: str
    arrived_at: float  # seconds since 1970, by the ingress's clock
    seconds: float  # from there to its end, or to now
    outcome: str | None  # as in antiphon_requests_total; None: it is open
    choices: list[ChoiceTimeline]


class Found(msgspec.Struct, frozen=True):
    """The answer to ``GET /requests/{request_id}``."""

    requests: list[RequestTimeline]  # clients may reuse an id; newest first
    num_ingresses: int
    num_silent: int  # of those, the ones that did not answer


def choice_timeline(journey: Journey) -> ChoiceTimeline:
    """Tell of a choice as it stands."""
    timing, last = journey.timing, journey.last_token_at
    return ChoiceTimeline(
        num_prompt_tokens=journey.num_prompt_tokens,
        num_cached_tokens=journey.num_cached_tokens,
        num_output_tokens=journey.num_tokens,
        finish_reason=journey.finish_reason,
        path=timing.prefill_path if timing is not None else None,
        ttft_seconds=journey.ttft_seconds,
        tpot_seconds=journey.tpot_seconds,
        longest_gap_seconds=journey.longest_gap_seconds,
        last_token_at=None if last is None else last - journey.arrived_at,
        parts=journey.parts(),
        remote=timing.remote if timing is not None else None,
        failed_prefills=timing.failed if timing is not None else (),
        attempts=[_attempt(each, journey.arrived_at) for each in journey.attempts],
    )


def _attempt(attempt: Attempt, arrived_at: float) -> AttemptTimeline:
    decision, ended_at = attempt.decision, attempt.ended_at
    return AttemptTimeline(
        worker=decision.decode.replica_id,
        role=decision.decode.role,
        node=decision.decode.node,
        reason=decision.reason,
        prefill=decision.prefill.replica_id if decision.prefill is not None else None,
        predicted_ttft_seconds=decision.predicted_ttft_seconds,
        sent_at=attempt.sent_at - arrived_at,
        ended_at=None if ended_at is None else ended_at - arrived_at,
        failure=attempt.failure,
    )
