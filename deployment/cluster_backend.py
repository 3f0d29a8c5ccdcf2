"""The HTTP layer's backend over the real workers: sessions, routing, retries.

Serve tells which workers there are (``set_workers``); for each a task keeps a session open, trying
again with growing pauses until Serve says that the worker is gone. A request goes where the policy
says. A worker that is busy, or lost before the first token, is excluded and the next one is tried;
each attempt is counted. After the first token a lost worker is an error that the client sees.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from antiphon.config import RouterConfig
from antiphon.deployment.worker_connection import WorkerConnection
from antiphon.errors import AntiphonError, CapacityError, TelemetryGapError, WorkerLostError
from antiphon.messages import (
    PrefillPeer,
    RequestOutput,
    Role,
    SamplingParams,
    Submit,
    Telemetry,
    WorkerCard,
)
from antiphon.metrics import Metrics
from antiphon.router.decision import Decision
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_RECONNECT_SECONDS = (0.05, 2.0)  # first and longest pause
_CLOSE_SECONDS = 5.0
_UNLIMITED = 2**31


class ClusterBackend:
    """Generates on the workers that Serve runs. Lives on one event loop.

    Args:
        model_name: The name that clients use.
        config: Of the router.
        needed_roles: Roles without which the endpoint isn't ready.
        metrics: Where retries are counted.
    """

    def __init__(
        self, model_name: str, config: RouterConfig, needed_roles: set[Role], metrics: Metrics
    ) -> None:
        self.model_name = model_name
        self._needed_roles = needed_roles
        self._metrics = metrics
        self._client_id = f"ingress-{uuid.uuid4().hex[:12]}"
        self._view = ClusterView()
        self._policy = Policy(config)
        self._connections: dict[str, WorkerConnection] = {}
        self._listed: dict[str, WorkerCard] = {}  # by incarnation; what Serve says runs now
        self._kept: set[str] = set()  # incarnations that a task holds a session with
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus output that any decode worker can take."""
        limits = [w.card.max_context_tokens for w in self._view.decode_workers]
        return min(limits, default=_UNLIMITED)

    def is_ready(self) -> tuple[bool, str]:
        """Whether every pool that was configured has a worker to route to."""
        views = (*self._view.prefill_workers, *self._view.decode_workers)
        usable = [v.card for v in views if v.card.incarnation in self._listed]
        missing = sorted(role.value for role in self._needed_roles - {c.role for c in usable})
        if missing:
            return False, f"no {' or '.join(missing)} worker is connected"
        return True, f"{len(usable)} workers are connected"

    def describe_workers(self) -> list[dict[str, Any]]:
        """Who is connected, where it runs and how busy it is."""
        described = []
        for connection in self._connections.values():
            view = self._view.get(connection.card.incarnation)
            load = msgspec.to_builtins(view.load) if view is not None else None
            described.append({**msgspec.to_builtins(connection.card), "load": load})
        return sorted(described, key=lambda worker: (worker["role"], worker["replica_id"]))

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

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""
        prompt = self._view.hash_prompt(prompt_token_ids)
        excluded: set[str] = set()
        refusal: AntiphonError | None = None
        while True:
            try:
                decision = self._policy.choose(
                    self._view, prompt, time.monotonic(), frozenset(excluded | self._leaving())
                )
            except CapacityError as error:
                raise refusal or error from None
            request = _submit(request_id, prompt_token_ids, sampling, decision)
            is_started = False
            try:
                async with aclosing(self._attempt(decision, request)) as outputs:
                    async for output in outputs:
                        is_started = True
                        yield output
                return
            except (CapacityError, WorkerLostError) as error:
                self._metrics.refused(type(error).__name__)
                logger.warning("request %s: attempt %d: %s", request_id, len(excluded) + 1, error)
                refusal = error
                excluded.add(decision.decode.incarnation)
                if is_started or len(excluded) >= _MAX_ATTEMPTS:
                    raise

    async def close(self) -> None:
        """End all sessions."""
        self._listed.clear()
        connections = tuple(self._connections.values())
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        closing = [asyncio.create_task(connection.close()) for connection in connections]
        if closing or tasks:
            await asyncio.wait([*closing, *tasks], timeout=_CLOSE_SECONDS)

    def _leaving(self) -> set[str]:
        """Workers that have a session still, but that Serve lists no more."""
        return self._connections.keys() - self._listed.keys()

    async def _attempt(
        self, decision: Decision, request: Submit
    ) -> AsyncGenerator[RequestOutput, None]:
        connection = self._connections.get(decision.decode.incarnation)
        if connection is None:
            raise WorkerLostError(f"the session with {decision.decode.replica_id} has just ended")
        self._policy.on_sent(self._view, decision)
        is_first = True
        try:
            # Closed at once, so that the worker is told when a client goes away.
            async with aclosing(connection.generate(request)) as outputs:
                async for output in outputs:
                    if is_first:
                        self._policy.on_first_token(decision)
                        is_first = False
                    if timing := output.timing:
                        seconds = timing.prompt + timing.first_step
                        self._metrics.first_token(timing.prefill_path, seconds)
                    yield output
        finally:
            self._policy.on_finished(decision)

    async def _keep(self, card: WorkerCard) -> None:
        """Hold a session with one incarnation for as long as Serve lists it."""
        pause, longest = _RECONNECT_SECONDS
        try:
            while card.incarnation in self._listed:
                began_at = time.monotonic()
                try:
                    await self._hold_session(card)
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
            await lost.wait()
        finally:
            self._connections.pop(card.incarnation, None)
            self._view.leave(card.incarnation)
            self._metrics.forget_worker(card.replica_id)

    def _apply(self, card: WorkerCard, telemetry: Telemetry) -> None:
        try:
            self._view.apply(card.incarnation, telemetry, time.monotonic())
            self._metrics.decode_step(card.replica_id, telemetry.load.decode_step_seconds)
        except TelemetryGapError as error:
            logger.warning("%s", error)
            if connection := self._connections.get(card.incarnation):
                self._spawn(connection.close())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _submit(
    request_id: str, prompt: list[int], sampling: SamplingParams, decision: Decision
) -> Submit:
    # Clients may name their requests, and two may choose one name: what workers see is unique.
    request_id = f"{request_id}-{secrets.token_hex(8)}"
    prefill = decision.prefill
    peer = PrefillPeer(prefill.url, prefill.incarnation) if prefill is not None else None
    return Submit(request_id, prompt, sampling, peer)
