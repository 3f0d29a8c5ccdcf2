"""The HTTP layer's backend over the real workers: sessions, routing, retries.

Serve tells which workers there are (``set_workers``); for each a task keeps a session open, trying
again with growing pauses until Serve says that the worker is gone. A request goes where the policy
says, and on to another worker if that one is busy, draining or lost, with what it has so far:
``deployment.replay`` keeps the account.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_metrics import ClusterCollector
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journey import Attempt, Journey
from antiphon.deployment.replay import Replay, replay_reason
from antiphon.deployment.request_spans import traced
from antiphon.deployment.submission import describe, submission
from antiphon.deployment.worker_connection import WorkerConnection
from antiphon.errors import (
    AntiphonError,
    CapacityError,
    InvalidParameterError,
    ServiceStoppingError,
    TelemetryGapError,
    WorkerLostError,
)
from antiphon.messages import (
    PrefillPeer,
    PrefillPool,
    RequestOutput,
    Role,
    SamplingParams,
    Submit,
    Telemetry,
    WorkerCard,
)
from antiphon.router.decision import Decision
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_RECONNECT_SECONDS = (0.05, 2.0)  # first and longest pause
_CLOSE_SECONDS = 5.0
_UNLIMITED = 2**31


class ClusterBackend:
    """Generates on the workers that Serve runs. Lives on one event loop.

    Args:
        model_name: The name that clients use.
        config: Of the router.
        needed_roles: Roles without which the endpoint isn't ready.
        metrics: Of this ingress.
    """

    def __init__(
        self,
        model_name: str,
        config: RouterConfig,
        needed_roles: set[Role],
        metrics: IngressMetrics,
    ) -> None:
        self.model_name = model_name
        self._needed_roles = needed_roles
        self._metrics = metrics
        self._client_id = f"ingress-{uuid.uuid4().hex[:12]}"
        self._view = ClusterView()
        self._config = config
        self._policy = Policy(config)
        self._stopping: ServiceStoppingError | None = None
        self._is_cut_off = False
        self._num_open = 0
        self._connections: dict[str, WorkerConnection] = {}
        self._listed: dict[str, WorkerCard] = {}  # by incarnation; what Serve says runs now
        self._kept: set[str] = set()  # incarnations that a task holds a session with
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.registry.register(ClusterCollector(self._view, needed_roles))

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus output that any decode worker can take."""
        limits = [w.card.max_context_tokens for w in self._view.decode_workers]
        return min(limits, default=_UNLIMITED)

    def is_ready(self) -> tuple[bool, str]:
        """Whether every pool that was configured has a worker to route to."""
        if self._stopping is not None:
            return False, str(self._stopping)
        views = (*self._view.prefill_workers, *self._view.decode_workers)
        usable = [v.card for v in views if v.card.incarnation in self._listed]
        missing = sorted(role.value for role in self._needed_roles - {c.role for c in usable})
        if missing:
            return False, f"no {' or '.join(missing)} worker is connected"
        return True, f"{len(usable)} workers are connected"

    @property
    def listed_workers(self) -> list[WorkerCard]:
        """The workers that Serve runs, connected or not."""
        return list(self._listed.values())

    @property
    def view(self) -> ClusterView:
        """What is known of the connected ones."""
        return self._view

    def describe_workers(self) -> list[dict[str, Any]]:
        """Who is connected, where it runs and how busy it is."""
        return describe(self._view, (each.card for each in self._connections.values()))

    def set_workers(self, role: Role, cards: Mapping[str, WorkerCard]) -> None:
        """Take in the running workers of one pool; on the event loop."""
        wanted = {card.incarnation: card for card in cards.values()}
        for incarnation, card in tuple(self._listed.items()):
            if card.role is role and incarnation not in wanted:
                # Route nothing more to it; requests that it still has may finish.
                del self._listed[incarnation]
        for incarnation, card in wanted.items():
            self._listed[incarnation] = card
            # A worker may be listed again while its session is still open: one is enough.
            if incarnation not in self._kept:
                self._kept.add(incarnation)
                self._spawn(self._keep(card))
        if role is Role.PREFILL:
            self._announce_prefill_pool(tuple(self._connections.values()))

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        journey: Journey | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""
        journey = journey or Journey(time.monotonic())
        if self._stopping is not None:
            raise self._stopping
        self._num_open += 1
        replay = Replay(prompt_token_ids, sampling, self._config)
        try:
            while (finish_reason := replay.finish_reason) is None:
                decision = await self._choose(replay)
                request = submission(request_id, replay, decision)
                try:
                    async with aclosing(self._attempt(decision, request, journey)) as outputs:
                        async for output in outputs:
                            journey.answered(output.timing)
                            yield replay.take(output)
                    return
                except (CapacityError, WorkerLostError, InvalidParameterError) as error:
                    journey.failed(replay_reason(error))
                    self._attempt_failed(request_id, replay, decision, error)
            yield RequestOutput(request_id, [], finish_reason)
        finally:
            self._num_open -= 1

    async def stop_taking(self, timeout_seconds: float) -> None:
        """Refuse new requests, and end with an error those that are open after the time-out."""
        self._stopping = ServiceStoppingError("this endpoint is being stopped")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while self._num_open and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if self._num_open:
            logger.warning("%d requests are cut off by the stop", self._num_open)
        self._is_cut_off = True
        for connection in self._connections.values():
            connection.fail_all(self._stopping)

    async def close(self) -> None:
        """End all sessions."""
        self._listed.clear()
        connections = tuple(self._connections.values())
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        closing = [asyncio.create_task(connection.close()) for connection in connections]
        if closing or tasks:
            await asyncio.wait([*closing, *tasks], timeout=_CLOSE_SECONDS)

    async def _choose(self, replay: Replay) -> Decision:
        """Choose workers, waiting for one if the request may wait."""
        began_at = time.monotonic()
        prompt = self._view.hash_prompt(replay.prompt_token_ids)
        while True:
            now = time.monotonic()
            if self._is_cut_off and self._stopping is not None:
                raise self._stopping
            exclude = frozenset(replay.excluded(now) | self._leaving())
            try:
                decision = self._policy.choose(self._view, prompt, now, exclude)
            except CapacityError as error:
                replay.wait_or_raise(error, now)
            else:
                self._metrics.decision_took(time.monotonic() - began_at)
                return decision
            await asyncio.sleep(_POLL_SECONDS)
            began_at = time.monotonic()

    def _attempt_failed(
        self, request_id: str, replay: Replay, decision: Decision, error: AntiphonError
    ) -> None:
        """Count and log a failed attempt, and raise what the client is to see, if it is over."""
        if isinstance(error, ServiceStoppingError):
            raise error
        reason = replay_reason(error)
        if isinstance(error, CapacityError):
            self._metrics.refused(reason)
        replay.failed(decision.decode.incarnation, error, time.monotonic())
        if isinstance(error, WorkerLostError):
            self._metrics.replayed(reason)
        logger.warning(
            "request %s: %s at %s with %d tokens: %s; another worker goes on",
            request_id, reason, decision.decode.replica_id, len(replay.output_token_ids), error,
        )  # fmt: skip

    def _leaving(self) -> set[str]:
        """Workers that have a session still, but that Serve lists no more."""
        return self._connections.keys() - self._listed.keys()

    async def _attempt(
        self, decision: Decision, request: Submit, journey: Journey
    ) -> AsyncGenerator[RequestOutput, None]:
        attempt = Attempt(decision, request.request_id, time.monotonic())
        journey.sent(attempt)
        request = traced(request, journey)
        connection = self._connections.get(decision.decode.incarnation)
        if connection is None:
            raise WorkerLostError(f"the session with {decision.decode.replica_id} has just ended")
        self._policy.on_sent(self._view, decision)
        self._metrics.decided(decision.reason)
        is_first = True
        try:
            # Closed at once, so that the worker is told when a client goes away.
            async with aclosing(connection.generate(request)) as outputs:
                async for output in outputs:
                    if is_first:
                        self._first_token_came(decision)
                        is_first = False
                    yield output
        finally:
            self._policy.on_finished(decision)
            attempt.ended_at = time.monotonic()

    def _first_token_came(self, decision: Decision) -> None:
        self._policy.on_first_token(decision)
        seconds = time.monotonic() - decision.decided_at
        self._metrics.first_token_came(decision.reason, decision.predicted_ttft_seconds, seconds)

    async def _keep(self, card: WorkerCard) -> None:
        """Hold a session with one incarnation for as long as Serve lists it."""
        pause, longest = _RECONNECT_SECONDS
        try:
            while card.incarnation in self._listed:
                began_at = time.monotonic()
                try:
                    await self._hold_session(card)
                    if card.incarnation in self._listed:
                        self._metrics.session_lost(card.role)
                    logger.warning("lost the session with %s worker %s", card.role, card.url)
                except AntiphonError as error:
                    logger.warning("cannot reach %s worker %s: %s", card.role, card.url, error)
                except Exception:  # giving up would lose the worker for as long as Serve lists it
                    logger.exception("session with %s worker %s failed", card.role, card.url)
                if time.monotonic() - began_at > longest:
                    pause = _RECONNECT_SECONDS[0]
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
        finally:
            self._kept.discard(card.incarnation)

    async def _hold_session(self, card: WorkerCard) -> None:
        lost = asyncio.Event()
        self._view.join(card)
        try:
            connection = await WorkerConnection.open(
                card,
                self._client_id,
                on_telemetry=lambda telemetry: self._apply(card, telemetry),
                on_lost=lost.set,
            )
            self._connections[card.incarnation] = connection
            logger.info("connected to %s worker %s", card.role, card.url)
            self._announce_prefill_pool([connection])
            await lost.wait()
        finally:
            self._connections.pop(card.incarnation, None)
            self._view.leave(card.incarnation)

    def _announce_prefill_pool(self, connections: Iterable[WorkerConnection]) -> None:
        """Let decode workers prewarm their links."""
        cards = [card for card in self._listed.values() if card.role is Role.PREFILL]
        pool = PrefillPool(tuple(PrefillPeer.of(card) for card in cards))
        for connection in connections:
            if connection.card.role is Role.DECODE:
                connection.announce(pool)

    def _apply(self, card: WorkerCard, telemetry: Telemetry) -> None:
        try:
            self._view.apply(card.incarnation, telemetry, time.monotonic())
        except TelemetryGapError as error:
            logger.warning("%s", error)
            if connection := self._connections.get(card.incarnation):
                self._spawn(connection.close())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
