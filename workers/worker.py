"""One worker: an engine, a session server, and the services that answer requests.

All roles run the same engine and both services: a prompt's KV is sent or its output generated as
each request asks. A role says what routers prefer a worker for. Engine reports arrive on the engine
thread and are passed to the event loop here; nothing below shares state between the two. Each
service ignores reports on requests of the other.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from antiphon.block_hash import BlockHash
from antiphon.messages import (
    Abort,
    ClientMessage,
    Load,
    Prefill,
    PrefillPool,
    Prewarm,
    RefusalKind,
    Refused,
    RequestOutput,
    Submit,
    WorkerCard,
)
from antiphon.workers.engine import Engine
from antiphon.workers.generate_service import GenerateService
from antiphon.workers.prefill_service import PrefillService
from antiphon.workers.prewarm import LinkPrewarmer
from antiphon.workers.request import Request
from antiphon.workers.request_trace import WorkerTracing
from antiphon.workers.scheduler import Scheduler
from antiphon.workers.session import Session, SessionServer
from antiphon.workers.telemetry import TelemetryPublisher
from antiphon.workers.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

Closer = Callable[[], Awaitable[None] | None]

_DRAIN_POLL_SECONDS = 0.05
_HAND_OVER_SECONDS = 5.0  # for transfers to let go of their blocks


class Worker:
    """Joins the parts; is the engine's listener and the session server's handler."""

    def __init__(self, card: WorkerCard, server: SessionServer, metrics: WorkerMetrics) -> None:
        self.card = card
        self.metrics = metrics
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._telemetry = TelemetryPublisher(self._loop, lambda: server.sessions)
        self.engine: Engine
        self.generate: GenerateService
        self.prefill: PrefillService
        self.prewarmer: LinkPrewarmer
        self.tracing: WorkerTracing
        self._closers: Sequence[Closer] = ()
        self._is_draining = False

    def run(
        self,
        engine: Engine,
        generate: GenerateService,
        prefill: PrefillService,
        closers: Sequence[Closer],
    ) -> None:
        """Start serving with an engine whose listener is this worker."""
        self.engine = engine
        self.generate = generate
        self.prefill = prefill
        self._closers = closers
        engine.start()
        self._server.serve(self)

    @property
    def is_healthy(self) -> bool:
        """Whether the engine can still take steps."""
        return self.engine.is_healthy

    async def drain(self, timeout_seconds: float) -> bool:
        """Take no new work, finish what is here, then hand the rest over to other workers.

        Args:
            timeout_seconds: For finishing; handing over takes milliseconds more.

        Returns:
            Whether everything was finished here.
        """
        self._is_draining = True
        self.metrics.drain()
        self._telemetry.drain()
        if await self._wait_until_idle(timeout_seconds):
            return True
        num_left = sum(service.hand_over() for service in self._services)
        logger.warning("%d requests are handed over to other workers", num_left)
        await self._wait_until_idle(_HAND_OVER_SECONDS)
        return False

    async def _wait_until_idle(self, timeout_seconds: float) -> bool:
        deadline = self._loop.time() + timeout_seconds
        while self.num_requests and self._loop.time() < deadline:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        return self.num_requests == 0

    async def close(self) -> None:
        """End sessions, stop the engine, close links."""
        await self._server.close()
        await asyncio.to_thread(self.engine.stop)
        for close in self._closers:
            closing = await asyncio.to_thread(close)
            if closing is not None:
                await closing

    @property
    def num_requests(self) -> int:
        """Requests and transfers to other workers that have not ended."""
        return sum(service.num_jobs for service in self._services)

    @property
    def _services(self) -> tuple[GenerateService, PrefillService]:
        return self.generate, self.prefill

    async def check_idle(self) -> None:
        """Assert that an idle worker holds no request and no block (for tests)."""
        done: asyncio.Future[str] = self._loop.create_future()

        def look(scheduler: Scheduler) -> None:
            problem = ""
            try:
                scheduler.check()
                assert len(scheduler.queues) == 0, f"{len(scheduler.queues)} requests are left"
                assert scheduler.pool.num_free == scheduler.pool.num_blocks, "blocks are held"
            except AssertionError as error:
                problem = str(error) or "an invariant does not hold"
            self._post(done.set_result, problem)

        self.engine.call(look)
        async with asyncio.timeout(30):
            problem = await done
        assert not problem, problem

    # From sessions, on the event loop.

    def on_opened(self, session: Session) -> None:
        """Give a subscriber its snapshot; deltas follow."""
        if session.wants_telemetry:
            session.send(self._telemetry.snapshot())

    def on_message(self, session: Session, message: ClientMessage) -> None:
        """Dispatch to the service."""
        match message:
            case Submit() | Prefill() if self._is_draining:
                self.metrics.refused("draining")
                reason = "this worker is being stopped"
                session.send(Refused(message.request_id, RefusalKind.DRAINING, reason))
            case Submit():
                self.generate.start(session, message)
            case Prefill():
                self.prefill.start(session, message)
            case PrefillPool():
                self.prewarmer.update(message.peers)
            case Prewarm() if not self._is_draining:
                self.prefill.prewarm(message)
            case Abort() if message.request_id in session.request_ids:
                self._abort(message.request_id)
            case _:
                pass  # an abort that crossed the request's end; no links to prewarm here

    def on_closed(self, session: Session) -> None:
        """The client is gone: stop all that it asked for."""
        for request_id in tuple(session.request_ids):
            self._abort(request_id)
        # It may be back already: a session that died in silence is noticed late.
        if all(other.client_id != session.client_id for other in self._server.sessions):
            self.prefill.leave(session.client_id)

    def _abort(self, request_id: str) -> None:
        self.generate.abort(request_id)
        self.prefill.abort(request_id, "aborted by the decode worker")

    # From the engine, on its thread.

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """Tokens of a step."""
        self._post(self.generate.on_outputs, outputs)

    def on_reserved(self, request: Request) -> None:
        """Blocks wait for KV from a prefill worker."""
        table, first_token = list(request.block_table), request.num_computed_tokens
        self._post(self.generate.on_reserved, request.request_id, table, first_token)

    def on_prompt_progress(self, request: Request) -> None:
        """More of a prefill-only prompt is computed."""
        self.prefill.on_progress(request)

    def on_refused(self, request_id: str, error: Exception) -> None:
        """A request was not taken or its step failed."""
        self._post(self.generate.on_refused, request_id, error)
        self._post(self.prefill.on_refused, request_id, error)

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        """After every step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._telemetry.report(stored, removed, load)

    def _post(self, function: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._loop.call_soon_threadsafe(function, *args)
