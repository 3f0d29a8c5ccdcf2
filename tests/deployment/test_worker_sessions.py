"""Sessions with real workers in this process: lost, refused, reopened, and announced to decode."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from pools import start, until
from tiny_models import tiny_model

from antiphon.deployment import worker_sessions
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.worker_sessions import WorkerSessions
from antiphon.errors import WorkerLostError
from antiphon.messages import Role
from antiphon.router.telemetry_view import ClusterView
from antiphon.workers.worker import Worker


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Rig:
    """Sessions of an ingress."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.metrics = IngressMetrics()
        self.sessions = WorkerSessions(self.view, self.metrics)

    def show(self, role: Role, *workers: Worker) -> None:
        """Say that Serve lists exactly these workers of a role."""
        self.sessions.set_workers(role, {w.card.replica_id: w.card for w in workers})

    async def connected(self, *workers: Worker) -> None:
        await until(lambda: all(self.view.get(w.card.incarnation) for w in workers))

    async def close(self, *workers: Worker) -> None:
        for closing in (self.sessions, *workers):
            await closing.close()
        assert not self.sessions.listed
        assert not self.sessions._tasks


def test_a_worker_of_another_model_is_told_of_once_scraped_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        worker, rig = await start(Role.COLOCATED, tiny_model("llama")), Rig()
        rig.sessions.model_fingerprint = worker.card.model_fingerprint
        other = msgspec.structs.replace(
            worker.card, replica_id="other", incarnation="x", model_fingerprint="another"
        )
        prefill = msgspec.structs.replace(other, role=Role.PREFILL, incarnation="y")
        for _ in range(2):  # Serve repeats itself
            rig.sessions.set_workers(Role.COLOCATED, {"own": worker.card, "other": other})
            rig.sessions.set_workers(Role.PREFILL, {"prefill": prefill})
        await rig.connected(worker)
        assert rig.view.cards.keys() == {worker.card.incarnation}
        assert rig.sessions.listed == [worker.card]
        assert rig.sessions.others == [other, prefill]
        assert rig.sessions.known == [worker.card, other, prefill]
        lines = [line for line in caplog.messages if "another, not tiny" in line]
        assert len(lines) == 2, lines
        rig.show(Role.COLOCATED, worker)
        assert rig.sessions.others == [prefill]
        await rig.close(worker)

    run(scenario())


def test_a_lost_session_is_counted_and_opened_again() -> None:
    async def scenario() -> None:
        worker, rig = await start(Role.COLOCATED, tiny_model("llama")), Rig()
        rig.show(Role.COLOCATED, worker)
        await rig.connected(worker)
        before = rig.sessions.get(worker.card.incarnation)
        (session,) = worker._server.sessions
        session.cut()
        await until(lambda: rig.view.get(worker.card.incarnation) is None)
        await rig.connected(worker)
        assert rig.sessions.get(worker.card.incarnation) not in (before, None)
        assert rig.metrics.count("antiphon_router_sessions_lost_total", pool="colocated") == 1
        await rig.close(worker)

    run(scenario())


def test_a_failure_while_connecting_does_not_lose_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_sessions, "_RECONNECT_SECONDS", (0.01, 0.02))
    open_session = worker_sessions.WorkerConnection.open
    failures: list[Exception] = [KeyError("a bug"), WorkerLostError("another incarnation")]

    async def fail_first(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return await open_session(*args, **kwargs)

    monkeypatch.setattr(worker_sessions.WorkerConnection, "open", fail_first)

    async def scenario() -> None:
        worker, rig = await start(Role.COLOCATED, tiny_model("llama")), Rig()
        rig.show(Role.COLOCATED, worker)
        await rig.connected(worker)
        assert not failures
        await rig.close(worker)

    run(scenario())


def test_a_worker_that_is_lost_is_sought_until_it_is_not_listed_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_sessions, "_RECONNECT_SECONDS", (0.01, 0.02))

    async def scenario() -> None:
        worker, rig = await start(Role.COLOCATED, tiny_model("llama")), Rig()
        rig.show(Role.COLOCATED, worker)
        await rig.connected(worker)
        await worker.close()
        await until(lambda: not rig.sessions.connected)
        assert rig.sessions._tasks
        rig.show(Role.COLOCATED)
        await until(lambda: not rig.sessions._tasks)
        assert not rig.sessions._kept
        await rig.close()

    run(scenario())


def test_a_worker_that_leaves_keeps_its_session_and_is_not_sought_afterwards() -> None:
    async def scenario() -> None:
        worker, rig = await start(Role.COLOCATED, tiny_model("llama")), Rig()
        rig.show(Role.COLOCATED, worker)
        await rig.connected(worker)
        incarnation = worker.card.incarnation
        assert (rig.sessions.is_listed(incarnation), rig.sessions.leaving) == (True, set())
        rig.show(Role.COLOCATED)
        assert (rig.sessions.is_listed(incarnation), rig.sessions.leaving) == (False, {incarnation})
        assert rig.sessions.get(incarnation) is not None
        assert [card.incarnation for card in rig.sessions.known] == [incarnation]
        assert not rig.sessions.listed
        await worker.close()
        await until(lambda: not rig.sessions._tasks)
        assert not rig.sessions.known
        assert rig.metrics.count("antiphon_router_sessions_lost_total", pool="colocated") == 0
        await rig.close()

    run(scenario())


def test_links_are_prewarmed_whoever_comes_first() -> None:
    async def scenario() -> None:
        model, rig = tiny_model("llama"), Rig()
        workers = [await start(role, model) for role in (Role.PREFILL, Role.DECODE, Role.PREFILL)]
        first, decode, second = workers
        rig.show(Role.PREFILL, first)
        rig.show(Role.DECODE, decode)
        counters = decode.generate.receiver.counters
        await until(lambda: counters().prewarmed_links == 1)
        rig.show(Role.PREFILL, first, second)
        await until(lambda: counters().prewarmed_links == 2)
        await rig.close(*workers)

    run(scenario())
