"""One worker: an engine, a session server, and the service that its role calls for.

All roles run the same engine. What differs is what happens when a prompt is done: a prefill worker
sends its KV, a decode or colocated worker samples. Engine reports arrive on the engine thread and
are passed to the event loop here; nothing below shares state between the two.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from antiphon.messages import (
    Abort,
    BlockHash,
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
from antiphon.metrics import Metrics
from antiphon.workers.engine import Engine
from antiphon.workers.generate_service import GenerateService
from antiphon.workers.prefill_service import PrefillService
from antiphon.workers.prewarm import LinkPrewarmer
from antiphon.workers.request import Request
from antiphon.workers.scheduler import Scheduler
from antiphon.workers.session import Session, SessionServer
from antiphon.workers.telemetry import TelemetryPublisher

logger = logging.getLogger(__name__)

_DRAIN_POLL_SECONDS = 0.05
_HAND_OVER_SECONDS = 5.0  # for transfers to let go of their blocks


class Worker:
    """Joins the parts; is the engine's listener and the session server's handler."""

    def __init__(self, card: WorkerCard, server: SessionServer, metrics: Metrics) -> None:
        self.card = card
        self.metrics = metrics
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._telemetry = TelemetryPublisher(self._loop, lambda: server.sessions)
        self.engine: Engine
        self.generate: GenerateService | None = None
        self.prefill: PrefillService | None = None
        self.prewarmer: LinkPrewarmer | None = None
        self._closers: Sequence[Callable[[], Awaitable[None] | None]] = ()
        self._is_draining = False

    def run(
        self,
        engine: Engine,
        service: GenerateService | PrefillService,
        closers: Sequence[Callable[[], Awaitable[None] | None]],
    ) -> None:
        """Start serving with an engine whose listener is this worker."""
        self.engine = engine
        if isinstance(service, GenerateService):
            self.generate = service
        else:
            self.prefill = service
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
        """Requests, or transfers of a prefill worker, that have not ended."""
        return sum(service.num_jobs for service in self._services)

    @property
    def _services(self) -> Sequence[GenerateService | PrefillService]:
        return [service for service in (self.generate, self.prefill) if service is not None]

    async def check_idle(self) -> None:
        """Assert that an idle worker holds no request and no block (for tests)."""
        done: asyncio.Future[str] = self._loop.create_future()

        def look(scheduler: Scheduler) -> None:
            problem = ""
            try:
                scheduler.check()
                assert scheduler.num_requests == 0, f"{scheduler.num_requests} requests are left"
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
        """Dispatch to the service; a message for another role is refused by name."""
        match message:
            case Submit() | Prefill() if self._is_draining:
                self.metrics.refused("draining")
                reason = "this worker is being stopped"
                session.send(Refused(message.request_id, RefusalKind.DRAINING, reason))
            case Submit() if self.generate is not None:
                self.generate.start(session, message)
            case Prefill() if self.prefill is not None:
                self.prefill.start(session, message)
            case PrefillPool() if self.prewarmer is not None:
                self.prewarmer.update(message.peers)
            case Prewarm() if self.prefill is not None and not self._is_draining:
                self.prefill.prewarm(message)
            case Submit() | Prefill():
                kind = type(message).__name__
                reason = f"a {self.card.role} worker does not take {kind}"
                session.send(Refused(message.request_id, RefusalKind.INVALID, reason))
            case Abort() if message.request_id in session.request_ids:
                self._abort(message.request_id)
            case _:
                pass  # an abort that crossed the request's end; no links to prewarm here

    def on_closed(self, session: Session) -> None:
        """The client is gone: stop all that it asked for."""
        for request_id in tuple(session.request_ids):
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        if self.generate is not None:
            self.generate.abort(request_id)
        if self.prefill is not None:
            self.prefill.abort(request_id, "aborted by the decode worker")

    # From the engine, on its thread.

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """Tokens of a step."""
        if self.generate is not None:
            self._post(self.generate.on_outputs, outputs)

    def on_reserved(self, request: Request) -> None:
        """Blocks wait for KV from a prefill worker."""
        if self.generate is not None:
            table, first_token = list(request.block_table), request.num_computed_tokens
            self._post(self.generate.on_reserved, request.request_id, table, first_token)

    def on_prompt_progress(self, request: Request) -> None:
        """More of a prefill-only prompt is computed."""
        if self.prefill is not None:
            self.prefill.on_progress(request)

    def on_refused(self, request_id: str, error: Exception) -> None:
        """A request was not taken or its step failed."""
        service = self.generate or self.prefill
        if service is not None:
            self._post(service.on_refused, request_id, error)

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        """After every step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._telemetry.report(stored, removed, load)

    def _post(self, function: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._loop.call_soon_threadsafe(function, *args)
