"""The prefill side of a hand-off: compute a prompt's KV and push it while it grows.

    Prefill -> open transfer, queue request -> push after every chunk -> finish -> PrefillDone
                     |                                                       |
                     +----- abort, step failure, link failure, hand-over -> blocks return, Refused

The blocks of a request stay with it until the sender reports the transfer's end, because until then
it may still read them. The sender reports every opened transfer's end exactly once.
"""

import asyncio
import contextlib
import logging
import re
import time
from dataclasses import dataclass

from antiphon.errors import AntiphonError, CapacityError, LinkBrokenError, WorkerBusyError
from antiphon.messages import Prefill, PrefillDone, Prewarm, RefusalKind, Refused
from antiphon.workers.engine import Engine
from antiphon.workers.handoff.outgoing import Computed
from antiphon.workers.handoff.sender import HandoffSender
from antiphon.workers.request import Request, RequestStatus
from antiphon.workers.request_limits import RequestLimits
from antiphon.workers.request_trace import PrefillTrace, WorkerTracing
from antiphon.workers.session import Session
from antiphon.workers.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_GIVEN_UP = "given_up"  # by the decode worker, or handed over
_HEAD_START_SECONDS = 0.05
_TRANSFER_ID = re.compile("[0-9a-f]{32}")


@dataclass(slots=True)
class _Job:
    session: Session
    message: Prefill
    num_pushed_tokens: int  # engine thread only
    trace: PrefillTrace | None
    pushed_at: float | None = None  # first, by the engine thread
    computed: Computed | None = None  # by the engine thread
    answer: str | None = None  # how it ended, once the decode worker knows


class PrefillService:
    """Answers ``Prefill`` messages."""

    def __init__(
        self,
        engine: Engine,
        sender: HandoffSender,
        metrics: WorkerMetrics,
        limits: RequestLimits,
        tracing: WorkerTracing,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._metrics = metrics
        self._limits = limits
        self._tracing = tracing
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, _Job] = {}

    @property
    def num_jobs(self) -> int:
        """Transfers that have not ended."""
        return len(self._jobs)

    def start(self, session: Session, message: Prefill) -> None:
        """Queue a prompt; on the event loop."""
        problem = self._problem(message)
        if problem:
            session.send(Refused(message.request_id, RefusalKind.INVALID, problem))
            logger.warning("%s refused: %s", _named(message), problem)
            return
        reason = "queue_full"
        try:
            # First, because the end of an opened transfer might overtake the refusal.
            self._engine.check_room()
            reason = "no_link"
            self._sender.open(message.request_id, message.link, message.first_token)
        except AntiphonError as error:
            self._metrics.refused(reason)
            session.send(Refused(message.request_id, RefusalKind.BUSY, str(error)))
            logger.info("%s refused: %s", _named(message), error)
            return
        trace = self._tracing.prefill(message)
        job = _Job(session, message, message.first_token, trace)
        self._jobs[message.request_id] = job
        session.request_ids.add(message.request_id)
        try:
            self._engine.add(Request(message.request_id, message.prompt_token_ids, sampling=None))
        except WorkerBusyError as error:  # the engine's thread has filled the queue since
            self.on_refused(message.request_id, error)

    def prewarm(self, message: Prewarm) -> None:
        """Make a link that no transfer wants yet, in the background."""
        try:
            self._sender.prewarm(message.link)
        except AntiphonError as error:
            peer = message.link.receiver_name or message.link.address
            logger.warning("no link to %s was prewarmed: %s", peer, error)

    def leave(self, decode_incarnation: str) -> None:
        """No session with a decode worker is left: give up the links to it."""
        self._sender.leave(decode_incarnation)

    def abort(self, transfer_id: str, reason: str) -> None:
        """Stop computing and sending; blocks return when the sender lets go of them."""
        if job := self._jobs.get(transfer_id):
            job.answer = job.answer or _GIVEN_UP
            # In this order: the end of the transfer, which frees the blocks, must find them marked.
            self._engine.abort(transfer_id, keep_blocks=True)
            self._sender.abort(transfer_id, reason)

    def hand_over(self) -> int:
        """Give up every transfer, so that the decode workers go on elsewhere; return how many.

        The refusals get a head start: over the link, the end of a transfer says less.
        """
        transfer_ids = tuple(self._jobs)
        for transfer_id in transfer_ids:
            job = self._jobs[transfer_id]
            if job.answer is None:
                job.answer = _GIVEN_UP
                reason = "this worker is being stopped"
                job.session.send(Refused(transfer_id, RefusalKind.MOVED, reason))
            self._loop.call_later(_HEAD_START_SECONDS, self.abort, transfer_id, "handed over")
        return len(transfer_ids)

    def on_progress(self, request: Request) -> None:
        """More of the prompt has KV; on the engine thread."""
        job = self._jobs.get(request.request_id)
        if job is None:
            return
        start, end = job.num_pushed_tokens, request.num_computed_tokens
        if end > start:
            self._sender.push(request.request_id, list(request.block_table), start, end)
            job.num_pushed_tokens = end
            job.pushed_at = job.pushed_at or time.monotonic()
        if request.status is RequestStatus.SENDING:
            queue, compute = request.timeline.computed(time.monotonic())
            job.computed = Computed(queue, compute, request.num_cached_tokens)
            self._sender.finish(request.request_id, job.computed)

    def on_refused(self, transfer_id: str, error: Exception) -> None:
        """The engine could not take or compute a prompt; on the event loop.

        The refusal gets a head start: over the link, the end of a transfer says less.
        """
        job = self._jobs.get(transfer_id)
        if job is not None:
            is_busy = isinstance(error, CapacityError)
            if is_busy:
                self._metrics.refused("queue_full")
            job.answer = "refused" if is_busy else "failed"
            kind = RefusalKind.BUSY if is_busy else RefusalKind.FAILED
            job.session.send(Refused(transfer_id, kind, str(error)))
            level = logging.INFO if is_busy else logging.WARNING
            logger.log(level, "%s %s: %s", _named(job.message), kind, error)
            self._loop.call_later(_HEAD_START_SECONDS, self._sender.abort, transfer_id, "refused")

    def on_transfer_ended(
        self, transfer_id: str, error: Exception | None, num_bytes: int, seconds: float
    ) -> None:
        """Nothing reads the request's blocks any more; on a link's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._loop.call_soon_threadsafe(self._reply, transfer_id, error, num_bytes, seconds)

    def _reply(
        self, transfer_id: str, error: Exception | None, num_bytes: int, seconds: float
    ) -> None:
        # From the loop, as ``start``: a link that breaks at once must not overtake the request.
        self._engine.abort(transfer_id)
        job = self._jobs.pop(transfer_id, None)
        if job is None:
            return
        job.session.request_ids.discard(transfer_id)
        if job.trace is not None:
            job.trace.end(_outcome(job, error), job.computed, job.pushed_at, num_bytes)
        if error is None:
            job.session.send(PrefillDone(num_bytes, seconds))
        elif job.answer is None:
            logger.warning("%s failed: %s", _named(job.message), error)
            kind = RefusalKind(_outcome(job, error))
            job.session.send(Refused(transfer_id, kind, str(error)))

    def _problem(self, message: Prefill) -> str | None:
        num_tokens = len(message.prompt_token_ids)
        if not _TRANSFER_ID.fullmatch(message.request_id):
            return "request_id: must be 32 hex digits"
        if message.request_id in self._jobs:
            return "request_id: already in use on this worker"
        if not 0 <= message.first_token < num_tokens:
            return f"first_token {message.first_token} is outside the {num_tokens} tokens"
        # A prompt that can never fit would keep all those behind it waiting.
        return self._limits.explain_prompt(message.prompt_token_ids)


def _named(message: Prefill) -> str:
    """For logs: the request, its transfer and who wants it."""
    peer = message.link.receiver_name or message.link.address
    return f"request {message.wanted_by or 'unknown'}: transfer {message.request_id} to {peer}"


def _outcome(job: _Job, error: Exception | None) -> str:
    if error is None:
        return "complete"
    if job.answer is not None:
        return job.answer
    is_broken = isinstance(error, LinkBrokenError)
    return RefusalKind.LINK_BROKEN if is_broken else RefusalKind.FAILED
