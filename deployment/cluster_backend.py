"""The HTTP layer's backend over the real workers: routing and retries.

A request goes where the policy says, and on to another worker if that one is busy, draining or
lost, with what it has so far: ``deployment.replay`` keeps the account. ``WorkerSessions`` holds the
sessions over which it goes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_metrics import ClusterCollector
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journey import Attempt, Journey
from antiphon.deployment.replay import Replay, replay_reason
from antiphon.deployment.request_spans import traced
from antiphon.deployment.submission import describe, submission
from antiphon.deployment.worker_sessions import ARRIVAL_SECONDS, WorkerSessions
from antiphon.errors import (
    AntiphonError,
    CapacityError,
    NoWorkerError,
    RequestError,
    ServiceStoppingError,
    WorkerLostError,
)
from antiphon.messages import RequestOutput, Role, SamplingParams, Submit, WorkerCard
from antiphon.router.decision import Decision
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_STOPPING = "this endpoint is being stopped"


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
        self._view = ClusterView()
        self.sessions = WorkerSessions(self._view, metrics, config.silence_seconds)
        self._config = config
        self._policy = Policy(config)
        self._is_stopping = False
        self._is_cut_off = False
        self._num_open = 0
        self._max_choices = 1  # of one request that are with the workers at once
        # Prompt plus output that every decode worker takes which Serve lists, or listed last:
        # requests are planned while the only one is being replaced, and wait for the next.
        self.max_context_tokens: int | None = None
        self._collector = ClusterCollector(self._view, needed_roles)
        metrics.registry.register(self._collector)

    def is_ready(self) -> tuple[bool, str]:
        """Whether every pool that was configured has a worker to route to."""
        if self._is_stopping:
            return False, _STOPPING
        views = (*self._view.prefill_workers, *self._view.decode_workers)
        usable = [v.card for v in views if self.sessions.is_listed(v.card.incarnation)]
        missing = sorted(role.value for role in self._needed_roles - {c.role for c in usable})
        if missing:
            return False, self._with_others(f"no {' or '.join(missing)} worker is connected")
        return True, f"{len(usable)} workers are connected"

    @property
    def listed_workers(self) -> list[WorkerCard]:
        """The workers to scrape: those that Serve runs, and those that leave and are not gone."""
        return self.sessions.known

    @property
    def view(self) -> ClusterView:
        """What is known of the connected ones."""
        return self._view

    def describe_workers(self) -> list[dict[str, Any]]:
        """Who is connected, where it runs and how busy it is."""
        return describe(self._view, self.sessions.connected)

    def set_workers(self, role: Role, cards: Mapping[str, WorkerCard]) -> None:
        """Take in the running workers of one pool; on the event loop."""
        self.sessions.set_workers(role, cards)
        decode = [card for card in self.sessions.listed if card.role is not Role.PREFILL]
        limits = [card.max_context_tokens for card in decode]
        self.max_context_tokens = min(limits, default=self.max_context_tokens)
        # Half of what queues hold, so that no single request fills them.
        queues = [max(1, card.max_waiting_requests // 2) for card in decode]
        self._max_choices = sum(queues) or self._max_choices

    def count_wanted(self, num_wanted: Callable[[], Mapping[Role, int]]) -> None:
        """Say whom metrics ask for how many workers each pool is to have."""
        self._collector.num_wanted = num_wanted

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        journey: Journey | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""
        journey = journey or Journey(time.monotonic())
        self._num_open += 1
        replay = Replay(prompt_token_ids, sampling, self._config, journey.answer)
        try:
            if self._is_stopping:
                raise ServiceStoppingError(_STOPPING)
            async with journey.answer.turn(self._max_choices):
                while (finish_reason := replay.finish_reason) is None:
                    decision = await self._choose(replay)
                    replay.fit(self.max_context_tokens or decision.decode.max_context_tokens)
                    request = submission(request_id, replay, decision)
                    try:
                        async with aclosing(self._attempt(decision, request, journey)) as outputs:
                            async for output in outputs:
                                self._settle(request_id, replay, "resumed")
                                journey.answered(output.timing)
                                yield replay.take(output)
                        return
                    except (CapacityError, WorkerLostError, RequestError) as error:
                        journey.failed(replay_reason(error))
                        self._attempt_failed(request_id, replay, decision, error)
            self._settle(request_id, replay, "complete")
            yield RequestOutput(request_id, [], finish_reason)
        except AntiphonError as error:
            self._settle(request_id, replay, "failed")
            if isinstance(error, CapacityError):
                num_tokens = len(prompt_token_ids)
                error.retry_after_seconds = self.sessions.retry_after_seconds(error, num_tokens)
            raise
        finally:
            self._settle(request_id, replay, "aborted")
            self._num_open -= 1

    async def stop_taking(self, timeout_seconds: float) -> None:
        """Refuse new requests, and end with an error those that are open after the time-out."""
        self._is_stopping = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        self.sessions.retry_after.stops_at = time.monotonic() + timeout_seconds
        while self._num_open and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if self._num_open:
            logger.warning("%d requests are cut off by the stop", self._num_open)
        self._is_cut_off = True
        self.sessions.fail_all(ServiceStoppingError(_STOPPING))

    async def close(self) -> None:
        """End all sessions."""
        await self.sessions.close()

    async def _choose(self, replay: Replay) -> Decision:
        """Choose workers, waiting for one if the request may wait."""
        began_at = asked_at = time.monotonic()
        prompt = replay.answer.hash_prompt(replay.prompt_token_ids, self._view)
        while True:
            now = time.monotonic()
            if self._is_cut_off:
                raise ServiceStoppingError(_STOPPING)
            exclude = frozenset(replay.excluded(now) | self.sessions.leaving)
            try:
                decision = self._policy.choose(self._view, prompt, now, exclude)
            except NoWorkerError as error:
                if not self._may_get_successor(replay, asked_at, now):
                    replay.wait_or_raise(NoWorkerError(self._with_others(str(error))), now)
            else:
                self._metrics.decision_took(time.monotonic() - began_at)
                return decision
            await asyncio.sleep(_POLL_SECONDS)
            began_at = time.monotonic()

    def _with_others(self, problem: str) -> str:
        """Say of workers that run but are of no use here, as in an update of the model."""
        num_others = len(self.sessions.others)
        return f"{problem}; workers of another model run: {num_others}" if num_others else problem

    def _may_get_successor(self, replay: Replay, asked_at: float, now: float) -> bool:
        """Whether a session that is being opened, or Serve's next list, may bring a worker."""
        if now - asked_at >= ARRIVAL_SECONDS:  # however many are listed and do not come
            return False
        if self.sessions.expect_worker(now):
            return True
        # A worker that stops says so itself, some milliseconds before Serve lists another one.
        return replay.was_turned_away or any(
            view.load.is_draining and view.card.role is not Role.PREFILL
            for view in self._view.views
            if self.sessions.is_listed(view.card.incarnation)
        )

    def _attempt_failed(
        self, request_id: str, replay: Replay, decision: Decision, error: AntiphonError
    ) -> None:
        """Count and log a failed attempt, and raise what the client is to see, if it is over."""
        if isinstance(error, ServiceStoppingError):
            raise error
        reason = replay_reason(error)
        if isinstance(error, CapacityError):
            self._metrics.refused(reason)
        logger.warning(
            "request %s: %s at %s with %d tokens: %s",
            request_id, reason, decision.decode.replica_id, len(replay.output_token_ids), error,
        )  # fmt: skip
        replay.failed(decision.decode.incarnation, error, time.monotonic())

    def _settle(self, request_id: str, replay: Replay, outcome: str) -> None:
        """Count and log what became of a request whose workers were lost, if any were."""
        if losses := replay.settle():
            for reason in losses:
                self._metrics.replayed(reason, outcome)
            logger.warning(
                "request %s: %s after its worker was %s, with %d tokens",
                request_id, outcome, " and ".join(losses), len(replay.output_token_ids),
            )  # fmt: skip

    async def _attempt(
        self, decision: Decision, request: Submit, journey: Journey
    ) -> AsyncGenerator[RequestOutput, None]:
        attempt = Attempt(decision, request.request_id, time.monotonic())
        journey.sent(attempt)
        request = traced(request, journey)
        connection = self.sessions.get(decision.decode.incarnation)
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
