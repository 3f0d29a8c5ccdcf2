"""Prefill and decode workers in this process, and an ingress that prefers one pair of them.

The preferred pair stands behind proxies and a faulty transport, and its engines tell a test of each
step before they take it. The spare pair, if there is one, takes over when the ingress, or decode,
has to.
"""

import asyncio
import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from faulty_transport import FaultyTransport, OnReceived, OnSend
from memory_transport import MemoryNetwork, MemoryTransport
from msgspec import structs
from pools import start, until
from session_proxy import SessionProxy

from antiphon.config import EngineConfig, HandoffConfig, RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.errors import NoWorkerError
from antiphon.messages import Role, WorkerCard
from antiphon.metrics import Metrics
from antiphon.router.decision import Decision
from antiphon.router.policy import Policy
from antiphon.workers.batch import Batch
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.worker import Worker

CHUNK_TOKENS = 16  # of a prefill step, so that a prompt of three chunks has a middle segment
# No decode worker computes a prompt by choice.
ROUTER = RouterConfig(local_prefill_max_tokens=0, replay_wait_seconds=1.0)
OnStep = Callable[[Batch], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a crew works with."""

    has_spares: bool = True
    over: Literal["memory", "gloo"] = "memory"


class _Watched:
    """A model runner that says what it is about to compute."""

    def __init__(self, runner: Any, on_step: OnStep) -> None:
        self._runner = runner
        self._on_step = on_step

    def run(self, batch: Batch, is_abandoned: Callable[[], bool]) -> Any:
        self._on_step(batch)
        return self._runner.run(batch, is_abandoned)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _PreferringPolicy(Policy):
    """Takes spare workers only where the preferred ones are excluded or gone."""

    spares: tuple[WorkerCard, ...] = ()

    def choose(
        self, view: Any, prompt: Any, now: float, exclude: frozenset[str] = frozenset()
    ) -> Decision:
        spare = frozenset(card.incarnation for card in self.spares)
        try:
            decision = super().choose(view, prompt, now, exclude | spare)
        except NoWorkerError:
            return super().choose(view, prompt, now, exclude)
        if decision.prefill is None:
            return decision
        alternates = tuple(card for card in self.spares if card.role is Role.PREFILL)
        return dataclasses.replace(decision, alternates=alternates)


class Crew:
    """The workers and the ingress; everything but the hooks runs on the event loop."""

    prefill: Worker
    decode: Worker
    spares: list[Worker]

    def __init__(self, model: Any, handoff: HandoffConfig, setting: Setting) -> None:
        self._model = model
        self._handoff = handoff
        self._setting = setting
        self._network = MemoryNetwork()
        self.killed: list[Worker] = []
        self._tasks_before = asyncio.all_tasks()
        self._threads_before = worker_threads()
        self.metrics = IngressMetrics()
        roles = {Role.PREFILL, Role.DECODE}
        self.backend = ClusterBackend("tiny", ROUTER, roles, self.metrics)

    async def start(self, on_send: OnSend, on_received: OnReceived, on_steps: list[OnStep]) -> None:
        """Start everything; ``on_steps`` are those of the prefill and of the decode worker."""
        self.transports = {
            Role.PREFILL: FaultyTransport(self._transport("prefill:0"), on_send=on_send),
            Role.DECODE: FaultyTransport(self._transport("decode:0"), on_received=on_received),
        }
        self.prefill = await self._start(Role.PREFILL, self.transports[Role.PREFILL])
        self.decode = await self._start(Role.DECODE, self.transports[Role.DECODE])
        roles = (Role.PREFILL, Role.DECODE) if self._setting.has_spares else ()
        self.spares = [await self._start(role, self._transport(f"{role}:1")) for role in roles]
        self.proxies = [SessionProxy(w.card.url) for w in (self.prefill, self.decode)]
        for worker, on_step in zip((self.prefill, self.decode), on_steps, strict=True):
            watch(worker, on_step)
        await self._list_workers()

    @property
    def workers(self) -> list[Worker]:
        """All of them, dead or alive."""
        return [self.prefill, self.decode, *self.spares]

    @property
    def alive(self) -> list[Worker]:
        """Those that were not killed."""
        return [worker for worker in self.workers if worker not in self.killed]

    async def wait_prewarmed(self) -> None:
        """Wait until every decode worker has a link to every prefill worker."""
        ends = [
            each.prefill._sender if each.card.role is Role.PREFILL else each.generate.receiver
            for each in self.workers
        ]
        num_peers = len(self.workers) // 2
        await until(lambda: all(end.counters().links_made >= num_peers for end in ends))

    async def unmake_links(self) -> None:
        """Break the idle links of the preferred prefill worker, so that requests make new ones."""
        for link in self.transports[Role.PREFILL].links:
            link.close()
        num_others = len(self.workers) // 2 - 1
        await until(lambda: self.decode.generate.receiver.num_links == num_others)

    async def kill(self, worker: Worker) -> None:
        """End a worker as SIGKILL would: its links and sockets break, and nothing is said."""
        self.killed.append(worker)
        self.transports[worker.card.role].sever()
        for session in [*worker._server.sessions, *_sessions_with_peers(worker)]:
            session.cut()
        await worker._server.close()

    async def close(self) -> None:
        """Close everything, the dead too; what is left of their threads and tasks must end."""
        await self.backend.close()
        for closing in [*self.workers, *self.proxies]:
            await closing.close()
        await until(lambda: asyncio.all_tasks() <= self._tasks_before, 10)
        await until(lambda: worker_threads() <= self._threads_before, 10)

    def _transport(self, address: str) -> Transport:
        if self._setting.over == "gloo":
            return GlooTransport("127.0.0.1")
        return MemoryTransport(self._network, address)

    async def _start(self, role: Role, transport: Any) -> Worker:
        budget = CHUNK_TOKENS if role is Role.PREFILL else None
        engine = EngineConfig(max_batch_tokens=budget)
        return await start(
            role, self._model, engine=engine, handoff=self._handoff, transport=transport
        )

    async def _list_workers(self) -> None:
        policy = _PreferringPolicy(ROUTER)
        policy.spares = tuple(worker.card for worker in self.spares)
        self.backend._policy = policy
        for worker, proxy in zip((self.prefill, self.decode), self.proxies, strict=True):
            behind = structs.replace(worker.card, url=await proxy.listen())
            spares = [w.card for w in self.spares if w.card.role is worker.card.role]
            cards = {card.replica_id: card for card in (behind, *spares)}
            self.backend.set_workers(worker.card.role, cards)
        await until(lambda: all(self.backend._view.get(w.card.incarnation) for w in self.workers))


def _sessions_with_peers(worker: Worker) -> list[Any]:
    tasks = worker.generate._client._peers._sessions.values()
    return [task.result() for task in tasks if task.done() and task.exception() is None]


def watch(worker: Worker, on_step: OnStep) -> None:
    """Call a function on the engine's thread before each step; what it raises fails the step."""
    worker.engine._runner = _Watched(worker.engine._runner, on_step)


def worker_threads() -> set[threading.Thread]:
    """The running threads of engines and links."""
    names = ("handoff", "antiphon")
    return {thread for thread in threading.enumerate() if thread.name.startswith(names)}


def total(metrics: IngressMetrics, name: str, **ignored: str) -> float:
    """Sum of a counter's samples over all labels; those that match ``ignored`` do not count."""
    return sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and not (ignored and ignored.items() <= sample.labels.items())
    )


def by_label(metrics: Metrics, name: str, label: str) -> Counter[str]:
    """A counter's samples that are not zero."""
    return Counter(
        {
            sample.labels[label]: int(sample.value)
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and sample.value
        }
    )


async def assert_no_handoffs(alive: list[Worker]) -> None:
    """Nobody waits for KV any more, and no link is open or held in quarantine but to the living."""

    def held() -> dict[str, int]:
        counts: Counter[str] = Counter()
        for worker in alive:
            num_peers = sum(other.card.role is not worker.card.role for other in alive)
            receiver, sender = worker.generate.receiver, worker.prefill._sender
            counts["climbs"] += len(worker.generate._ladder._climbs)
            counts["awaited"] += len(worker.generate._client._transfers) + receiver.num_pending
            counts["transfers"] += len(sender._transfers)
            counts["quarantined bytes"] += receiver.quarantined_bytes
            counts["links"] += max(0, receiver.num_links + sender.num_links - num_peers)
        return dict(+counts)

    with contextlib.suppress(TimeoutError):
        await until(lambda: not held(), 10)
    assert held() == {}
