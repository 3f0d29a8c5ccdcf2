"""The decode side: owns a request from submission to its last token.

    Submit -> queue -> reserve blocks --local----------------------> running -> StepOutput*
                |             |                                         ^
                |             +--remote--> ladder: get the KV ----------+
                |                            |
                +-- full, invalid, failed ---+-- no way to get it ---> Refused
                                                                        (busy, moved, ...)

``workers.prefill_ladder`` says how the KV is got. A request leaves this worker in one way only:
``_end``, after its transfer was fenced off and its blocks were given back.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from antiphon.errors import CapacityError, PrefillFailedError, WorkerBusyError
from antiphon.messages import RefusalKind, Refused, RequestOutput, StepOutput, Submit
from antiphon.workers.block_pool import BlockId
from antiphon.workers.engine import Engine
from antiphon.workers.prefill_client import PrefillClient, Wanted
from antiphon.workers.prefill_ladder import LadderLimits, PrefillLadder
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.request_limits import RequestLimits
from antiphon.workers.request_trace import GenerationTrace, WorkerTracing
from antiphon.workers.scheduler import Scheduler
from antiphon.workers.session import Session
from antiphon.workers.shunned_peers import ShunnedPeers
from antiphon.workers.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerateLimits:
    """Bounds of a ``GenerateService``."""

    request: RequestLimits
    ladder: LadderLimits
    max_fallback_tokens: int  # prompt tokens queued here, those of a fallback included


@dataclass(slots=True, eq=False)
class _Job:
    session: Session
    message: Submit
    trace: GenerationTrace | None


class GenerateService:
    """Answers ``Submit`` messages. All methods run on the event loop unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        client: PrefillClient,
        metrics: WorkerMetrics,
        limits: GenerateLimits,
        tracing: WorkerTracing,
    ) -> None:
        self._engine = engine
        self._client = client
        self._metrics = metrics
        self._limits = limits
        self._tracing = tracing
        self._ladder = PrefillLadder(client, ShunnedPeers(), limits.ladder, metrics, self)
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, _Job] = {}
        self.receiver = client.receiver

    @property
    def num_jobs(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def start(self, session: Session, message: Submit) -> None:
        """Queue a request, or refuse it at once."""
        request_id = message.request_id
        problem = self._problem(message)
        if problem:
            session.send(Refused(request_id, RefusalKind.INVALID, problem))
            return
        path = PrefillPath.REMOTE if message.prefill else PrefillPath.LOCAL
        self._jobs[request_id] = _Job(session, message, self._tracing.generation(message))
        session.request_ids.add(request_id)
        try:
            self._engine.add(Request(request_id, message.prompt_token_ids, message.sampling, path))
        except WorkerBusyError as error:
            self.on_refused(request_id, error)

    def abort(self, request_id: str) -> None:
        """Stop a request here and on the prefill worker."""
        if request_id in self._jobs:
            self._release(request_id)
            self._end(request_id, "aborted")

    def hand_over(self) -> int:
        """Give every request back to whoever sent it, to go on elsewhere; return how many."""
        request_ids = tuple(self._jobs)
        for request_id in request_ids:
            self._release(request_id)
            reason = "this worker is being stopped"
            self._refuse(request_id, Refused(request_id, RefusalKind.MOVED, reason), "moved")
        return len(request_ids)

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """Tokens of a step, handed to the sessions that asked for them."""
        by_session: dict[Session, list[RequestOutput]] = {}
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue  # aborted since
            if job.trace is not None and output.timing is not None:
                job.trace.first_token(output.timing, output.num_cached_tokens)
            by_session.setdefault(job.session, []).append(output)
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason)
        for session, session_outputs in by_session.items():
            session.send(StepOutput(session_outputs))

    def on_refused(self, request_id: str, error: Exception) -> None:
        """The engine could not take a request, or its step failed; it holds nothing any more."""
        if request_id not in self._jobs:
            return
        self._ladder.stop(request_id)
        if isinstance(error, CapacityError):
            self._refuse_busy(request_id, "queue_full", str(error))
        else:
            refusal = Refused(request_id, RefusalKind.FAILED, str(error))
            self._refuse(request_id, refusal, "failed")

    def on_reserved(self, request_id: str, block_table: list[BlockId], first_token: int) -> None:
        """Blocks are reserved: get the KV that they lack."""
        job = self._jobs.get(request_id)
        if job is not None:
            # The last token is an ordinary decode step.
            token_ids = job.message.prompt_token_ids[:-1]
            span = job.trace.span if job.trace is not None else None
            wanted = Wanted(request_id, token_ids, block_table, first_token, span)
            self._ladder.start(wanted, job.message.prefill)

    # From the ladder.

    def kv_arrived(self, wanted: Wanted) -> None:
        """All that was wanted is in place."""
        self._engine.kv_arrived(wanted.request_id, len(wanted.token_ids), wanted.handoff)

    def compute_here(self, wanted: Wanted) -> asyncio.Future[bool]:
        """Compute what did not arrive, if not too many prompt tokens are queued already."""
        answer: asyncio.Future[bool] = self._loop.create_future()

        def decide(scheduler: Scheduler) -> None:
            # On the engine thread, so that of many fallbacks at once each sees those before it.
            num_queued = scheduler.num_queued_tokens
            num_tokens = num_queued + wanted.num_missing
            has_room = num_queued == 0 or num_tokens <= self._limits.max_fallback_tokens
            if has_room:
                request = scheduler.kv_arrived(
                    wanted.request_id, wanted.num_in_place, PrefillPath.FALLBACK, time.monotonic()
                )
                if request is not None:
                    request.timeline.handoff = wanted.handoff
            with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
                self._loop.call_soon_threadsafe(_answer, answer, has_room)

        self._engine.call(decide)
        return answer

    def kv_unavailable(self, request_id: str, error: PrefillFailedError) -> None:
        """Every rung of the ladder failed: give the blocks back and say so."""
        logger.warning("request %s: refused, its KV cannot be had: %s", request_id, error)
        self._release(request_id)
        self._refuse_busy(
            request_id,
            "no_headroom",
            f"prefill failed ({error.outcome}), and too many prompt tokens are queued here",
        )

    def _refuse_busy(self, request_id: str, metric_reason: str, reason: str) -> None:
        self._metrics.refused(metric_reason)
        self._refuse(request_id, Refused(request_id, RefusalKind.BUSY, reason), "refused")

    def _refuse(self, request_id: str, message: Refused, outcome: str) -> None:
        self._jobs[request_id].session.send(message)
        self._end(request_id, outcome)

    def _release(self, request_id: str) -> None:
        """Fence off the transfer, then give the blocks back: the order is what makes it safe."""
        self._ladder.stop(request_id)
        self._engine.abort(request_id)

    def _end(self, request_id: str, outcome: str) -> None:
        job = self._jobs.pop(request_id)
        job.session.request_ids.discard(request_id)
        self._metrics.request_ended(outcome)
        if job.trace is not None:
            job.trace.end(outcome)

    def _problem(self, message: Submit) -> str | None:
        if message.request_id in self._jobs:
            return "request_id: already in use on this worker"
        return self._limits.request.explain_generation(message.prompt_token_ids, message.sampling)


def _answer(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():  # the request may have been aborted meanwhile
        future.set_result(value)
