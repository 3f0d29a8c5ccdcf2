"""The spans of one request on one worker, made from what its services note; on the event loop.

    decode worker  >  queue, prefill_queue, prefill, transfer, decode_queue, first_step, generate
                      (as in ``RequestTiming``; attempts at other workers lie beside them)
    prefill worker >  queue, compute, transfer (from the first KV to the end, beside compute)

Phases are made when all is over, from durations, so that an engine step never makes one.
"""

import time

from antiphon.messages import Prefill, Submit, WorkerCard
from antiphon.request_timing import RequestTiming
from antiphon.tracing import OUTCOME, WORKER, Attribute, RequestSpan, Tracing
from antiphon.workers.handoff.outgoing import Computed

_PHASES = ("queue", "prefill_queue", "prefill", "transfer", "decode_queue", "first_step")
_ERRORS = {"failed", "refused", "link_broken"}


class WorkerTracing:
    """Begins the spans of a worker.

    Args:
        tracing: None: there are none.
        card: Of the worker.
    """

    def __init__(self, tracing: Tracing | None, card: WorkerCard) -> None:
        self._tracing = tracing
        self._worker = card.replica_id

    def close(self) -> None:
        """Send the spans that are left, for a bounded time."""
        if self._tracing is not None:
            self._tracing.close()

    def generation(self, message: Submit) -> "GenerationTrace | None":
        """A request to generate has come; None if it is not sampled."""
        began_at = time.monotonic()
        span = self._begin("decode worker", message, began_at, {})
        return GenerationTrace(span, began_at) if span is not None else None

    def prefill(self, message: Prefill) -> "PrefillTrace | None":
        """A prompt to compute has come; None if it is not sampled."""
        began_at = time.monotonic()
        attributes: dict[str, Attribute] = {
            "antiphon.first_token": message.first_token,
            "antiphon.transfer_id": message.request_id,  # what this worker's log calls it
        }
        span = self._begin("prefill worker", message, began_at, attributes)
        return PrefillTrace(span, began_at) if span is not None else None

    def _begin(
        self,
        name: str,
        message: Submit | Prefill,
        began_at: float,
        attributes: dict[str, Attribute],
    ) -> RequestSpan | None:
        if self._tracing is None or message.trace is None:
            return None
        attributes[WORKER] = self._worker
        attributes["antiphon.num_prompt_tokens"] = len(message.prompt_token_ids)
        return self._tracing.begin(name, message.trace, began_at, attributes)


class GenerationTrace:
    """A request on its decode worker."""

    def __init__(self, span: RequestSpan, began_at: float) -> None:
        self.span = span
        self._began_at = began_at
        self._timing: RequestTiming | None = None
        self._num_cached_tokens = 0

    def first_token(self, timing: RequestTiming, num_cached_tokens: int) -> None:
        """The first token has come."""
        self._timing, self._num_cached_tokens = timing, num_cached_tokens

    def end(self, outcome: str) -> None:
        """The request ends here."""
        now = time.monotonic()
        if self._timing is not None:
            self._make_phases(self._timing, now)
        self.span.note({OUTCOME: outcome})
        self.span.end(now, error=outcome if outcome in _ERRORS else None)

    def _make_phases(self, timing: RequestTiming, now: float) -> None:
        at = self._began_at
        for name in _PHASES:
            at = self.span.phase(name, at, getattr(timing, name))
        self.span.phase("generate", at, now - at)
        self.span.note(
            {
                "antiphon.prefill_path": timing.prefill_path,
                "antiphon.num_cached_tokens": self._num_cached_tokens,
            }
        )


class PrefillTrace:
    """A prompt on a prefill worker."""

    def __init__(self, span: RequestSpan, began_at: float) -> None:
        self._span = span
        self._began_at = began_at

    def end(
        self, outcome: str, computed: Computed | None, pushed_at: float | None, num_bytes: int
    ) -> None:
        """Its transfer ended.

        Args:
            outcome: In a word.
            computed: None if the prompt was not computed to its end.
            pushed_at: When there was KV to send for the first time; None: never.
            num_bytes: That were sent.
        """
        now = time.monotonic()
        if computed is not None:
            at = self._span.phase("queue", self._began_at, computed.queue_seconds)
            tokens = {"antiphon.num_cached_tokens": computed.num_cached_tokens}
            self._span.phase("compute", at, computed.compute_seconds, tokens)
        if pushed_at is not None:
            sent = {"antiphon.num_bytes": num_bytes}
            self._span.phase("transfer", pushed_at, now - pushed_at, sent)
        self._span.note({OUTCOME: outcome})
        self._span.end(now, error=outcome if outcome in _ERRORS else None)
