"""Streams that outlive their workers: what the client gets is what it would have got."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from crew import total
from msgspec import structs
from pools import assert_idle, start, until
from tiny_models import oracle, tiny_model

from antiphon.config import EngineConfig, RouterConfig
from antiphon.deployment import worker_sessions
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.errors import NoWorkerError, ServiceStoppingError, WorkerBusyError, WorkerLostError
from antiphon.messages import RequestOutput, Role, SamplingParams
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(40)]
MAX_TOKENS = 150
SEEDED = SamplingParams(MAX_TOKENS, temperature=1.0, top_p=0.9, seed=1234)
GREEDY = SamplingParams(MAX_TOKENS, temperature=0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Stream:
    """A generation that is being read, as a client does."""

    def __init__(self, backend: ClusterBackend, sampling: SamplingParams = GREEDY) -> None:
        self.outputs: list[RequestOutput] = []
        self.task = asyncio.create_task(self._read(backend, sampling))

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    async def _read(self, backend: ClusterBackend, sampling: SamplingParams) -> list[int]:
        async for output in backend.generate("r", PROMPT, sampling):
            self.outputs.append(output)
        return self.tokens


class Cluster:
    """Colocated workers, slow enough to be stopped in mid-stream, behind a backend."""

    def __init__(self, model: Any, num_workers: int = 2, **router: Any) -> None:
        self._model = model
        self._num_workers = num_workers
        self.metrics = IngressMetrics()
        self.backend = ClusterBackend(
            "tiny", RouterConfig(**router), {Role.COLOCATED}, self.metrics
        )
        self.workers: list[Worker] = []

    async def __aenter__(self) -> "Cluster":
        for _ in range(self._num_workers):
            await self.add()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.backend.close()
        if failure[0] is None:
            await assert_idle(*self.workers)
            assert self.backend._num_open == 0
        for worker in self.workers:
            await worker.close()

    async def add(self, **engine: Any) -> Worker:
        worker = await start(Role.COLOCATED, self._model, engine=EngineConfig(**engine))
        self.workers.append(worker)
        self.show(*self.workers)
        await until(lambda: self.backend._view.get(worker.card.incarnation) is not None)
        return worker

    def show(self, *workers: Worker) -> None:
        """Say that Serve lists exactly these workers."""
        cards = {worker.card.replica_id: worker.card for worker in workers}
        self.backend.set_workers(Role.COLOCATED, cards)

    def owner(self) -> Worker:
        (worker,) = [worker for worker in self.workers if worker.num_requests]
        return worker

    async def kill(self, worker: Worker) -> None:
        """Break every session of a worker, as the death of its process does."""
        self.workers.remove(worker)
        for session in tuple(worker._server.sessions):
            session.cut()
        self.show(*self.workers)
        await worker.close()

    def replays(self, reason: str, outcome: str) -> float:
        return self.metrics.count("antiphon_replays_total", reason=reason, outcome=outcome)


def undisturbed(model: Any, sampling: SamplingParams) -> list[int]:
    """What the stream is when nothing happens."""

    async def scenario() -> list[int]:
        async with Cluster(model, 1) as cluster:
            return await Stream(cluster.backend, sampling).task

    return asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_a_stream_continues_exactly_on_another_worker(
    how: str, sampling: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    expected = undisturbed(model, sampling)
    if sampling is GREEDY:
        assert expected == oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        # A worker that stops in good order costs no replay, however few there may be.
        async with Cluster(model, 3, max_replays=2 if how == "killed" else 0) as cluster:
            stream, victims = Stream(cluster.backend, sampling), []
            for num_tokens in (5, 40):
                await until(lambda n=num_tokens: len(stream.tokens) >= n)  # type: ignore[misc]
                victims.append(victim := cluster.owner())
                if how == "killed":
                    await cluster.kill(victim)
                else:
                    assert not await victim.drain(0.0)
            assert await stream.task == expected
            assert cluster.replays("lost" if how == "killed" else "moved", "resumed") == 2
            assert total(cluster.metrics, "antiphon_replays_total") == 2
            assert [o.finish_reason for o in stream.outputs if o.finish_reason] == ["length"]
            assert len({output.num_cached_tokens for output in stream.outputs}) == 1
            assert sum(output.timing is not None for output in stream.outputs) == 1
            lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            reason = "lost" if how == "killed" else "moved"
            for victim in victims:
                begins = f"request r: {reason} at {victim.card.replica_id} with "
                assert len([line for line in lines if line.startswith(begins)]) == 1

    run(scenario())


async def stream_without_worker(cluster: Cluster) -> Stream:
    """A stream that has begun, and whose only worker has been killed."""
    stream = Stream(cluster.backend)
    await until(lambda: len(stream.tokens) >= 3)
    await cluster.kill(cluster.owner())
    await until(lambda: not cluster.backend._view.decode_workers)
    return stream


def test_replays_have_a_limit_and_then_the_error_is_honest() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 3, max_replays=1) as cluster:
            stream = Stream(cluster.backend)
            for num_tokens in (3, 20):
                await until(lambda n=num_tokens: len(stream.tokens) >= n)  # type: ignore[misc]
                await cluster.kill(cluster.owner())
            with pytest.raises(WorkerLostError, match="is gone"):
                await stream.task
            assert cluster.replays("lost", "resumed") == cluster.replays("lost", "failed") == 1

    run(scenario())


def test_a_request_whose_only_worker_dies_is_told_when_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anybody but the session knows of it."""
    monkeypatch.setattr(worker_sessions, "ARRIVAL_SECONDS", 0.0)  # it has been here for long
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            (worker,) = cluster.workers
            gate = threading.Event()
            worker.engine.call(lambda _: gate.wait(20))  # no token leaves
            stream = Stream(cluster.backend)
            await until(lambda: worker.num_requests == 1)
            (session,) = worker._server.sessions
            session.cut()
            with pytest.raises(NoWorkerError) as refused:
                await stream.task
            assert 4.0 < refused.value.retry_after_seconds <= 5.0, "Serve asks it every 5 s"
            assert cluster.replays("lost", "failed") == 1
            gate.set()

    run(scenario())


def test_a_stream_waits_for_a_worker_to_come_back() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            stream = await stream_without_worker(cluster)
            with pytest.raises(NoWorkerError):  # what has not begun is told at once
                await Stream(cluster.backend).task
            await cluster.add()
            assert await stream.task == expected

    run(scenario())


def test_a_stream_returns_to_its_worker_when_only_the_session_broke() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            stream = Stream(cluster.backend)
            await until(lambda: len(stream.tokens) >= 3)
            (session,) = cluster.owner()._server.sessions
            session.cut()
            assert await stream.task == expected
            assert cluster.replays("lost", "resumed") == 1

    run(scenario())


def test_the_wait_for_another_worker_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 1, replay_wait_seconds=0.2) as cluster:
            stream = Stream(cluster.backend)
            await until(lambda: len(stream.tokens) >= 3)
            await cluster.kill(cluster.owner())
            with pytest.raises(NoWorkerError):
                await asyncio.wait_for(stream.task, 2)
            assert cluster.replays("lost", "failed") == 1
            assert total(cluster.metrics, "antiphon_replays_total") == 1
            lines = [line for line in caplog.messages if line.startswith("request r: ")]
            assert "lost at" in lines[0]
            assert lines[1].startswith("request r: failed after its worker was lost")
            assert not any(str(PROMPT[:3])[1:-1] in line for line in caplog.messages)

    run(scenario())


def test_an_answer_ends_with_an_error_rather_than_go_on_with_another_model() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, 1, replay_wait_seconds=0.2) as cluster:
            (first,), backend = cluster.workers, cluster.backend
            backend.sessions.model_fingerprint = first.card.model_fingerprint
            heir = await start(Role.COLOCATED, tiny_model("llama", seed=1))
            card = structs.replace(heir.card, model_fingerprint="another")
            stream = Stream(backend)
            await until(lambda: len(stream.tokens) >= 3)
            (session,) = first._server.sessions
            session.cut()
            backend.set_workers(Role.COLOCATED, {"heir": card})
            with pytest.raises(NoWorkerError, match="workers of another model run: 1"):
                await stream.task
            assert stream.tokens == expected[: len(stream.tokens)]
            with pytest.raises(NoWorkerError, match="workers of another model run: 1"):
                await Stream(backend).task
            assert backend.is_ready() == (
                False, "no colocated worker is connected; workers of another model run: 1",
            )  # fmt: skip
            await heir.close()

    run(scenario())


def test_a_client_that_leaves_while_its_stream_waits_is_no_failure() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            stream = await stream_without_worker(cluster)
            assert total(cluster.metrics, "antiphon_replays_total") == 0, "not known yet"
            stream.task.cancel()
            await asyncio.wait({stream.task})
            assert cluster.replays("lost", "aborted") == 1
            assert total(cluster.metrics, "antiphon_replays_total") == 1

    run(scenario())


def test_a_stream_that_lost_its_worker_waits_for_room_at_a_full_one() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            (first,) = cluster.workers
            full = await cluster.add(max_waiting_requests=1)
            cluster.show(first)
            stream = Stream(cluster.backend)
            await until(lambda: len(stream.tokens) >= 3)
            gate = threading.Event()
            full.engine.call(lambda _: gate.wait(20))
            cluster.show(full)
            other = Stream(cluster.backend, SamplingParams(2, temperature=0))
            await until(lambda: full.num_requests == 1)
            await cluster.kill(first)
            refused = cluster.metrics.count
            await until(lambda: refused("antiphon_refusals_total", reason="busy") == 1)
            gate.set()
            assert await stream.task == expected
            assert len(await other.task) == 2

    run(scenario())


def test_a_worker_that_drains_gets_nothing_new_at_once_and_says_so() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 2) as cluster:
            leaving, staying = cluster.workers
            stream = Stream(cluster.backend)
            await until(lambda: len(stream.tokens) >= 3)
            if leaving.num_requests == 0:
                leaving, staying = staying, leaving
            drain = asyncio.create_task(leaving.drain(30))
            await until(
                lambda: (
                    [v.card.incarnation for v in cluster.backend._view.decode_workers]
                    == [staying.card.incarnation]
                ),
                seconds=1.0,
            )
            for _ in range(3):
                assert len(await Stream(cluster.backend, SamplingParams(2, 0.0)).task) == 2
            assert await drain
            assert len(await stream.task) == MAX_TOKENS
            cluster.backend._view.check()
            count = cluster.metrics.count
            assert count("antiphon_refusals_total", reason="draining") == 0
            assert total(cluster.metrics, "antiphon_replays_total") == 0

    run(scenario())


def test_a_refusal_by_a_draining_worker_that_was_chosen_too_late_is_no_failure() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 2, max_replays=0) as cluster:
            assert len(await Stream(cluster.backend, SamplingParams(2, 0.0)).task) == 2
            chosen = max(cluster.workers, key=lambda worker: worker.engine.stats.num_steps)
            view = cluster.backend._view
            await until(lambda: view.match(view.hash_prompt(PROMPT), 0.0).confirmed != {})
            chosen._is_draining = True  # its telemetry has not said so yet, and it has the prefix
            assert len(await Stream(cluster.backend, SamplingParams(2, 0.0)).task) == 2
            count = cluster.metrics.count
            assert count("antiphon_refusals_total", reason="draining") == 1

    run(scenario())


def test_a_full_worker_says_so_in_milliseconds_whatever_step_it_computes() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 0) as cluster:
            full = await cluster.add(max_waiting_requests=2)
            gate = threading.Event()
            full.engine.call(lambda _: gate.wait(20))
            waiting = [Stream(cluster.backend, SamplingParams(2, 0.0)) for _ in range(2)]
            await until(lambda: full.num_requests == 2)
            loop = asyncio.get_running_loop()
            seconds = []
            for _ in range(5):
                began = loop.time()
                with pytest.raises(WorkerBusyError, match="2 requests are waiting here already"):
                    await Stream(cluster.backend).task
                seconds.append(loop.time() - began)
            assert min(seconds) < 0.05
            gate.set()
            for stream in waiting:
                assert len(await stream.task) == 2

    run(scenario())


@pytest.mark.parametrize("has_time", [True, False])
def test_an_endpoint_that_stops_finishes_what_is_open_or_says_why_not(has_time: bool) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, 1) as cluster:
            stream = Stream(cluster.backend)
            await until(lambda: len(stream.tokens) >= 3)
            stopping = asyncio.create_task(cluster.backend.stop_taking(30.0 if has_time else 0.0))
            await asyncio.sleep(0)  # lets the stop begin
            with pytest.raises(ServiceStoppingError):
                await Stream(cluster.backend).task
            assert cluster.backend.is_ready() == (False, "this endpoint is being stopped")
            if has_time:
                assert len(await stream.task) == MAX_TOKENS
            else:
                with pytest.raises(ServiceStoppingError):
                    await stream.task
            await stopping

    run(scenario())
