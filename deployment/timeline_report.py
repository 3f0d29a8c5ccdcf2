"""Draws a request's timeline for a terminal: each part with its share, and a bar where it lies."""

import time
from collections.abc import Iterable, Iterator

from antiphon.deployment.request_timeline import (
    AttemptTimeline,
    ChoiceTimeline,
    Found,
    RequestTimeline,
)

_BAR_COLUMNS = 40


def report(found: Found) -> Iterator[str]:
    """Yield the lines of everything that was found."""
    for index, request in enumerate(found.requests):
        if index:
            yield ""
        yield from _request(request)
    if found.num_silent:
        yield ""
        yield f"{found.num_silent} of {found.num_ingresses} ingresses did not answer."


def _request(request: RequestTimeline) -> Iterator[str]:
    arrived = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(request.arrived_at))
    state = request.outcome or "open"
    yield f"request {request.request_id}: {state}, {_ms(request.seconds)} ms"
    yield f"  POST {request.path}, arrived {arrived} UTC at {request.ingress or 'the ingress'}"
    if request.trace_id is not None:
        yield f"  trace {request.trace_id}"
    for index, choice in enumerate(request.choices):
        yield ""
        yield from _choice(index, choice, request)


def _choice(index: int, choice: ChoiceTimeline, request: RequestTimeline) -> Iterator[str]:
    yield (
        f"choice {index}: {choice.num_prompt_tokens} prompt tokens, {choice.num_cached_tokens} "
        f"cached; {choice.num_output_tokens} output tokens, {choice.finish_reason or 'unfinished'}"
    )
    if choice.ttft_seconds is not None:
        yield f"  first token after {_ms(choice.ttft_seconds)} ms, {choice.path or 'path unknown'}"
    if choice.tpot_seconds is not None:
        yield (
            f"  then {_ms(choice.tpot_seconds)} ms a token, "
            f"longest gap {_ms(choice.longest_gap_seconds)} ms"
        )
    yield ""
    yield from _bars(_stretches(choice, request.seconds), request.seconds)
    yield ""
    yield from (_attempt(each, request.seconds) for each in choice.attempts)
    yield from _prefills(choice)


def _stretches(choice: ChoiceTimeline, seconds: float) -> list[tuple[str, float]]:
    """What a choice did, from its arrival to its request's end; names with seconds."""
    if choice.ttft_seconds is None or choice.last_token_at is None:
        return [("no token yet", seconds)]
    first = list(choice.parts.items()) or [("first token", choice.ttft_seconds)]
    last = choice.last_token_at
    return [*first, ("output", last - choice.ttft_seconds), ("end", seconds - last)]


def _bars(stretches: Iterable[tuple[str, float]], whole: float) -> Iterator[str]:
    yield f"  {'part':<14}{'ms':>11}{'share':>9}"
    at = 0.0
    for name, seconds in stretches:
        bar = _bar(at, seconds, whole)
        yield f"  {name:<14}{_ms(seconds):>11}{_share(seconds, whole):>9}  {bar}".rstrip()
        at += seconds
    yield f"  {'whole':<14}{_ms(whole):>11}{_share(whole, whole):>9}"


def _bar(at: float, seconds: float, whole: float) -> str:
    """``#`` for each column that it fills at least half of, ``|`` where there is none."""
    if seconds <= 0 or whole <= 0:
        return ""
    begin = min(round(_BAR_COLUMNS * at / whole), _BAR_COLUMNS - 1)
    length = round(_BAR_COLUMNS * (at + seconds) / whole) - begin
    return " " * begin + ("#" * length or "|")


def _attempt(attempt: AttemptTimeline, seconds: float) -> str:
    via = f" with {attempt.prefill}" if attempt.prefill is not None else ""
    lasted = (seconds if attempt.ended_at is None else attempt.ended_at) - attempt.sent_at
    how = attempt.failure or ("open" if attempt.ended_at is None else "ended")
    return (
        f"  at {_ms(attempt.sent_at)} ms {attempt.role} worker {attempt.worker}{via}: {how} after "
        f"{_ms(lasted)} ms; {attempt.reason}, predicted {_ms(attempt.predicted_ttft_seconds)} ms"
    )


def _prefills(choice: ChoiceTimeline) -> Iterator[str]:
    for failed in choice.failed_prefills:
        yield f"  prefill at {failed.worker}: {failed.outcome} after {_ms(failed.seconds)} ms"
    if (remote := choice.remote) is not None:
        yield (
            f"  prefill at {remote.worker}: queue {_ms(remote.queue)}, compute "
            f"{_ms(remote.compute)}, send {_ms(remote.send)} ms; "
            f"{remote.num_sent_tokens} tokens sent, {remote.num_cached_tokens} cached"
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _share(seconds: float, whole: float) -> str:
    return f"{100 * seconds / whole:.1f} %" if whole > 0 else ""
