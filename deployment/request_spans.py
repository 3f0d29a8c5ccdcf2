"""The spans of a request at its ingress.

    POST /v1/...  >  choice  >  prepare   arrival until workers are chosen: template, tokens, turn
                                choose    the router's choice
                                attempt   the worker has it; the worker's span is below this one

A second attempt has a choice of its own; a stream that waits for a worker waits between the two.
Attempts begin when they do, since workers must know them. The rest is made at the end.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from antiphon.deployment.http_planning import Body
from antiphon.deployment.journey import Attempt, Journey
from antiphon.deployment.openai_api import ChatCompletionRequest
from antiphon.messages import Submit
from antiphon.tracing import OUTCOME, WORKER, Attribute, RequestSpan

_HTTP_ERROR = 500  # from here on a server's span has failed; a client's fault is none of ours


def begin_choices(span: RequestSpan, body: Body, journeys: Sequence[Journey]) -> None:
    """Say what is asked for, and begin a span for each choice."""
    is_chat = isinstance(body, ChatCompletionRequest)
    span.note(
        {
            "gen_ai.operation.name": "chat" if is_chat else "text_completion",
            "gen_ai.provider.name": "antiphon",
            "gen_ai.request.model": body.model,
            "gen_ai.request.choice.count": body.n,
            "gen_ai.request.max_tokens": body.output_limit[1],
            "gen_ai.request.stream": body.stream,
            "gen_ai.request.temperature": body.temperature,
            "gen_ai.request.top_p": body.top_p,
            "gen_ai.usage.input_tokens": sum(j.num_prompt_tokens for j in journeys) // body.n,
        }
    )
    for index, journey in enumerate(journeys):
        attributes: dict[str, Attribute] = {"antiphon.choice": index}
        journey.span = span.child("choice", journey.arrived_at, attributes)


def traced(request: Submit, journey: Journey) -> Submit:
    """Begin the span of a journey's last attempt, which the worker's go below; if it has any."""
    span, attempt = journey.span, journey.attempts[-1]
    if span is None:
        return request
    if len(journey.attempts) == 1:
        seconds = attempt.decision.decided_at - journey.arrived_at
        span.phase("prepare", journey.arrived_at, seconds)
    attempt.span = _begin_attempt(span, attempt)
    return replace(request, trace=attempt.span.context())


def _begin_attempt(span: RequestSpan, attempt: Attempt) -> RequestSpan:
    decision = attempt.decision
    predicted: dict[str, Attribute] = {
        "antiphon.reason": decision.reason.value,
        "antiphon.predicted_ttft_seconds": decision.predicted_ttft_seconds,
        "antiphon.num_cached_tokens.decode": decision.num_cached_tokens_decode,
        "antiphon.num_cached_tokens.prefill": decision.num_cached_tokens_prefill,
    }
    span.phase("choose", decision.decided_at, attempt.sent_at - decision.decided_at, predicted)
    prefill = decision.prefill.replica_id if decision.prefill is not None else None
    workers = {WORKER: decision.decode.replica_id, "antiphon.prefill_worker": prefill}
    return span.child("attempt", attempt.sent_at, workers, calls_out=True)


def end_request(span: RequestSpan, journeys: Sequence[Journey], outcome: str, status: int) -> None:
    """End all spans of a request; nothing of it goes on."""
    for journey in journeys:
        if journey.span is not None:
            _end_choice(journey.span, journey, outcome)
    finish_reasons = [j.finish_reason for j in journeys if j.finish_reason is not None]
    span.note(
        {
            OUTCOME: outcome,
            "http.response.status_code": status or None,
            "gen_ai.response.finish_reasons": finish_reasons or None,
            "gen_ai.usage.output_tokens": sum(j.num_tokens for j in journeys),
        }
    )
    has_failed = status >= _HTTP_ERROR or outcome == "failed"
    span.end(error=outcome if has_failed else None)


def _end_choice(span: RequestSpan, journey: Journey, outcome: str) -> None:
    for attempt in journey.attempts:
        if attempt.span is not None:
            attempt.span.end(attempt.ended_at, error=attempt.failure)
    timing = journey.timing
    span.note(
        {
            "antiphon.num_attempts": len(journey.attempts),
            "antiphon.prefill_path": timing.prefill_path if timing is not None else None,
            "antiphon.longest_gap_seconds": journey.longest_gap_seconds,
            "gen_ai.usage.input_tokens": journey.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": journey.num_cached_tokens,
            "gen_ai.usage.output_tokens": journey.num_tokens,
            "gen_ai.response.time_to_first_chunk": journey.ttft_seconds,
        }
    )
    span.end(error=outcome if outcome == "failed" else None)
