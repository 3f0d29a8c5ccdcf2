"""The way of one choice through the system, as its ingress sees it; metrics and traces read it.

    arrived -> attempt sent -> (failed: the next one) ... -> first token -> ... last token

The HTTP layer opens a journey when a request arrives and notes tokens as they leave; the backend
notes attempts. Readings are of this process's ``time.monotonic``; what happened on workers comes as
durations with the first token. The parts add up to the time to the first token:

    route          arrival to the message being sent: template, tokens, its turn among the choices
                   of its request, choice of workers, failed attempts
    submit         the decode worker's queue, until blocks were reserved
    prefill_queue  prefill  transfer  decode_queue  first_step     see ``RequestTiming``
    return         both ways between ingress and worker, and until the token leaves
"""

from dataclasses import dataclass, field

from antiphon.deployment.shared_answer import SharedAnswer
from antiphon.request_timing import RequestTiming
from antiphon.router.decision import Decision
from antiphon.tracing import RequestSpan

PARTS = (
    "route", "submit", "prefill_queue", "prefill", "transfer", "decode_queue", "first_step",
    "return",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Attempt:
    """One decode worker asked for a choice, or for what is left of it."""

    decision: Decision
    request_id: str  # as the workers know it
    sent_at: float
    ended_at: float | None = None
    failure: str | None = None  # busy, draining, lost, moved or invalid
    span: RequestSpan | None = None


@dataclass(slots=True, eq=False)
class Journey:
    """One choice, from its request's arrival to its end."""

    arrived_at: float
    num_prompt_tokens: int = 0
    answer: SharedAnswer = field(default_factory=SharedAnswer)  # with the request's other choices
    attempts: list[Attempt] = field(default_factory=list)
    timing: RequestTiming | None = None  # of the attempt that gave the first token
    first_sent_at: float = 0.0  # of that attempt
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, on the decode worker
    longest_gap_seconds: float = 0.0
    span: RequestSpan | None = None
    finish_reason: str | None = None

    @property
    def ttft_seconds(self) -> float | None:
        """From the request's arrival to the first token leaving; None before it."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time from a token to the next; None before the second one."""
        if self.first_token_at is None or self.last_token_at is None or self.num_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_tokens - 1)

    def sent(self, attempt: Attempt) -> None:
        """Note that a worker was asked."""
        self.attempts.append(attempt)

    def failed(self, failure: str) -> None:
        """Note that the last attempt failed."""
        attempt = self.attempts[-1]
        attempt.failure = failure
        if attempt.ended_at is None:  # it was never sent
            attempt.ended_at = attempt.sent_at

    def answered(self, timing: RequestTiming | None) -> None:
        """Note what a worker says with an output; only of the first token it says something."""
        if timing is not None and self.timing is None and self.attempts:
            self.timing, self.first_sent_at = timing, self.attempts[-1].sent_at

    def took(self, num_tokens: int, now: float) -> float | None:
        """Note tokens that leave now.

        Returns:
            Seconds since the tokens before them; None if there are none.
        """
        if num_tokens == 0:
            return None
        gap = None
        if self.last_token_at is None:
            self.first_token_at = now
        else:
            gap = now - self.last_token_at
            self.longest_gap_seconds = max(self.longest_gap_seconds, gap)
        self.last_token_at = now
        self.num_tokens += num_tokens
        return gap

    def parts(self) -> dict[str, float]:
        """The time to the first token by part, seconds; empty before it."""
        timing = self.timing
        if timing is None or self.first_token_at is None:
            return {}
        seconds = (
            self.first_sent_at - self.arrived_at, timing.queue, timing.prefill_queue,
            timing.prefill, timing.transfer, timing.decode_queue, timing.first_step,
            self.first_token_at - self.first_sent_at - timing.total,
        )  # fmt: skip
        return dict(zip(PARTS, seconds, strict=True))
