"""An ingress's sessions: one with each worker of its model that Serve lists.

    connecting --> connected --lost--> pause --> connecting    while Serve lists the worker
                                         +-----> gone          once it does not

For each incarnation a task keeps a session open, trying again with growing pauses until Serve says
that the worker is gone. While a session lasts, the view knows the worker. One that Serve lists no
more keeps its session for as long as the session lasts, so that its requests may finish.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Iterable, Mapping

from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.worker_connection import WorkerConnection
from antiphon.errors import AntiphonError, CapacityError, TelemetryGapError
from antiphon.messages import PrefillPeer, PrefillPool, Role, Telemetry, WorkerCard
from antiphon.router.retry_after import RetryAfter
from antiphon.router.telemetry_view import ClusterView
from antiphon.workers.session import SILENCE_SECONDS

logger = logging.getLogger(__name__)

ARRIVAL_SECONDS = 5.0  # as long as a session may take to open
_RECONNECT_SECONDS = (0.05, 2.0)  # first and longest pause
_CLOSE_SECONDS = 5.0


class WorkerSessions:
    """Lives on one event loop.

    Args:
        view: That workers join and leave, and whose telemetry it takes in.
        metrics: Of this ingress.
        silence_seconds: After which a worker that answers no ping is gone.

    Attributes:
        model_fingerprint: Of the model that this ingress tokenises for, to be set before workers
            are; None, as where no ingress is around this: workers of any model are used.
    """

    def __init__(
        self,
        view: ClusterView,
        metrics: IngressMetrics,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._view = view
        self._metrics = metrics
        self._silence_seconds = silence_seconds
        self.model_fingerprint: str | None = None
        self.retry_after = RetryAfter(time.monotonic())
        self._client_id = f"ingress-{uuid.uuid4().hex[:12]}"
        self._connections: dict[str, WorkerConnection] = {}
        self._listed: dict[str, WorkerCard] = {}  # by incarnation; what Serve says runs now
        self._others: dict[str, WorkerCard] = {}  # the same, but of another model
        self._expected_until: dict[str, float] = {}  # of those that generate
        self._kept: set[str] = set()  # incarnations that a task holds a session with
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def listed(self) -> list[WorkerCard]:
        """The workers of this model that Serve runs, connected or not."""
        return list(self._listed.values())

    @property
    def others(self) -> list[WorkerCard]:
        """The workers of another model that Serve runs; none is connected."""
        return list(self._others.values())

    @property
    def connected(self) -> list[WorkerCard]:
        """The workers with a session, listed or not."""
        return [connection.card for connection in self._connections.values()]

    @property
    def known(self) -> list[WorkerCard]:
        """The workers that Serve runs, and those that it stops, until their sessions end."""
        leaving = self.leaving
        stopping = (card for card in self.connected if card.incarnation in leaving)
        return [*self.listed, *self.others, *stopping]

    @property
    def leaving(self) -> set[str]:
        """Incarnations that have a session still, but that Serve lists no more."""
        return self._connections.keys() - self._listed.keys()

    def is_listed(self, incarnation: str) -> bool:
        """Whether Serve says that it runs."""
        return incarnation in self._listed

    def expect_worker(self, now: float) -> bool:
        """Whether a worker that generates was just listed, and may be usable any moment.

            listed ──session, first report──▶ usable     some 20 ms, for which requests may wait
               └──────── 5 s ────────▶ nobody waits for it any more, but it is still tried

        In an update Serve stops the last worker of before, then drops it in the message that lists
        its successor. Without this, who asks in between is refused though a worker runs.
        """
        return any(
            now < until and self._view.get(incarnation) is None
            for incarnation, until in self._expected_until.items()
        )

    def get(self, incarnation: str) -> WorkerConnection | None:
        """The session with a worker, if it is open."""
        return self._connections.get(incarnation)

    def set_workers(self, role: Role, cards: Mapping[str, WorkerCard]) -> None:
        """Take in the running workers of one pool."""
        wanted = {card.incarnation: card for card in self._of_this_model(role, cards)}
        for incarnation, card in tuple(self._listed.items()):
            if card.role is role and incarnation not in wanted:
                # Route nothing more to it; requests that it still has may finish.
                del self._listed[incarnation]
                self._expected_until.pop(incarnation, None)
        for incarnation, card in wanted.items():
            self._listed[incarnation] = card
            self.retry_after.learn(card)
            if card.role is not Role.PREFILL:  # the first time counts
                self._expected_until.setdefault(incarnation, time.monotonic() + ARRIVAL_SECONDS)
            # A worker may be listed again while its session is still open: one is enough.
            if incarnation not in self._kept:
                self._kept.add(incarnation)
                self._spawn(self._keep(card))
        self._changed()
        if role is Role.PREFILL:
            self._announce_prefill_pool(tuple(self._connections.values()))

    def retry_after_seconds(self, error: CapacityError, num_prompt_tokens: int) -> float:
        """When a request that found no place should come again."""
        now = time.monotonic()
        return self.retry_after.seconds(error, self._view, self._listed, num_prompt_tokens, now)

    def fail_all(self, error: AntiphonError) -> None:
        """End every request on every session."""
        for connection in self._connections.values():
            connection.fail_all(error)

    async def close(self) -> None:
        """End all sessions."""
        self._listed.clear()
        connections = tuple(self._connections.values())
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        closing = [asyncio.create_task(connection.close()) for connection in connections]
        if closing or tasks:
            await asyncio.wait([*closing, *tasks], timeout=_CLOSE_SECONDS)

    def _of_this_model(self, role: Role, cards: Mapping[str, WorkerCard]) -> list[WorkerCard]:
        """Set the others of a pool aside, and log each of them once."""
        own, others = [], {}
        for card in cards.values():
            if self.model_fingerprint in (None, card.model_fingerprint):
                own.append(card)
                continue
            others[card.incarnation] = card
            if card.incarnation not in self._others:
                logger.warning(
                    "%s worker %s gets nothing from here: its model fingerprint is %s, not %s",
                    role, card.replica_id, card.model_fingerprint, self.model_fingerprint,
                )  # fmt: skip
        kept = {known: card for known, card in self._others.items() if card.role is not role}
        self._others = kept | others
        return own

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
                silence_seconds=self._silence_seconds,
            )
            self._connections[card.incarnation] = connection
            logger.info("connected to %s worker %s", card.role, card.url)
            self._announce_prefill_pool([connection])
            await lost.wait()
        finally:
            self._connections.pop(card.incarnation, None)
            self._view.leave(card.incarnation)
            self._changed()

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
            self._changed()
        except TelemetryGapError as error:
            logger.warning("%s", error)
            if connection := self._connections.get(card.incarnation):
                self._spawn(connection.close())

    def _changed(self) -> None:
        """Workers have come or gone, perhaps."""
        self.retry_after.observe(self._view, self._listed, time.monotonic())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
