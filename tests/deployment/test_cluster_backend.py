"""The backend over real workers in this process: retries, losses, readiness."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from pools import assert_idle, start, until
from scripted_backend import CharTokenizer
from tiny_models import oracle, tiny_model

from antiphon.config import EngineConfig, HandoffConfig, RouterConfig
from antiphon.deployment import cluster_backend, worker_sessions
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_planning import Planner
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.openai_api import ChatCompletionRequest
from antiphon.deployment.worker_connection import WorkerConnection
from antiphon.errors import NoWorkerError, ServiceStoppingError, WorkerBusyError
from antiphon.messages import RequestOutput, Role, SamplingParams, Telemetry, WorkerCard
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(20)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def backend_for(*roles: Role) -> ClusterBackend:
    return ClusterBackend("tiny", RouterConfig(), set(roles), IngressMetrics())


def show(backend: ClusterBackend, role: Role, *workers: Worker) -> None:
    """Say that Serve lists exactly these workers of a role."""
    backend.set_workers(role, {w.card.replica_id: w.card for w in workers})


async def connected(backend: ClusterBackend, role: Role, *workers: Worker) -> None:
    show(backend, role, *workers)
    await until(lambda: all(backend._view.get(w.card.incarnation) for w in workers))


async def generate(backend: ClusterBackend, max_tokens: int, request_id: str = "r") -> list[int]:
    tokens: list[int] = []
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    async for output in backend.generate(request_id, PROMPT, sampling):
        tokens += output.token_ids
    return tokens


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[int]:
    return [token async for output in outputs for token in output.token_ids]


async def close(*closing: Any) -> None:
    for one in closing:
        await one.close()


def test_a_pair_of_pools_answers_as_the_model_does() -> None:
    model = tiny_model("llama")
    prompt = PROMPT * 5
    expected = oracle(model, prompt, 6)

    async def scenario() -> None:
        prefill, decode = await start(Role.PREFILL, model), await start(Role.DECODE, model)
        backend = backend_for(Role.PREFILL, Role.DECODE)
        assert backend.is_ready() == (False, "no decode or prefill worker is connected")
        await connected(backend, Role.DECODE, decode)
        assert backend.is_ready() == (False, "no prefill worker is connected")
        await connected(backend, Role.PREFILL, prefill)
        assert backend.is_ready()[0]
        tokens: list[int] = []
        async for output in backend.generate("r", prompt, SamplingParams(6, temperature=0)):
            tokens += output.token_ids
        assert tokens == expected
        assert prefill.engine.stats.num_prompt_tokens == len(prompt) - 1
        async for output in backend.generate("again", prompt, SamplingParams(1, temperature=0)):
            assert output.num_cached_tokens == 96, "whole blocks"
        await assert_idle(prefill, decode)
        await close(backend, prefill, decode)
        assert not backend.sessions._tasks

    run(scenario())


def test_a_stranger_reaches_no_worker_and_nobody_who_asks_gets_a_key() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        decode = await start(Role.DECODE, model)
        stranger, backend = backend_for(Role.DECODE), backend_for(Role.DECODE)
        found = msgspec.structs.replace(decode.card, session_key="guessed")
        stranger.set_workers(Role.DECODE, {found.replica_id: found})
        await connected(backend, Role.DECODE, decode)
        (described,) = backend.describe_workers()
        assert described["url"] == decode.card.url
        assert decode.card.session_key not in str(described)

        def num_refused() -> float:
            return decode.metrics.count("antiphon_session_refusals_total", reason="key")

        await until(lambda: num_refused() > 0)
        assert not stranger.is_ready()[0]
        assert backend.is_ready()[0]
        await assert_idle(decode)
        await close(stranger, backend, decode)

    run(scenario())


def test_the_next_best_prefill_worker_stands_in_for_one_that_hangs() -> None:
    model = tiny_model("llama")
    prompt = PROMPT * 5
    expected = oracle(model, prompt, 6)

    async def scenario() -> None:
        prefills = [await start(Role.PREFILL, model) for _ in range(2)]
        decode = await start(Role.DECODE, model, handoff=HandoffConfig(stall_seconds=0.2))
        backend = backend_for(Role.PREFILL, Role.DECODE)
        await connected(backend, Role.DECODE, decode)
        await connected(backend, Role.PREFILL, *prefills)
        release = [threading.Event(), threading.Event()]
        for worker, event in zip(prefills, release, strict=True):
            worker.engine.call(lambda _, event=event: event.wait(20))
        outputs = backend.generate("r", prompt, SamplingParams(6, temperature=0))
        answer = asyncio.create_task(collect(outputs))
        await until(lambda: sum(worker.num_requests for worker in prefills) == 1)
        hangs = 0 if prefills[0].num_requests else 1
        release[1 - hangs].set()
        assert await answer == expected
        count = decode.metrics.count
        assert count("antiphon_prefill_attempts_total", outcome="stalled") == 1
        assert count("antiphon_prefill_attempts_total", outcome="complete") == 1
        release[hangs].set()
        await assert_idle(*prefills, decode)
        await close(backend, *prefills, decode)

    run(scenario())


def test_a_busy_worker_is_excluded_and_the_next_one_tried() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        tight = EngineConfig(max_num_requests=1, max_waiting_requests=1)
        full = await start(Role.COLOCATED, model, engine=tight)
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, full)
        longs = [asyncio.create_task(generate(backend, 300, "runs"))]
        await until(lambda: full.engine.stats.num_steps > 0)
        longs.append(asyncio.create_task(generate(backend, 2, "waits")))
        await until(lambda: full.num_requests == 2)
        with pytest.raises(WorkerBusyError, match="waiting here already"):
            await generate(backend, 2)
        other = await start(Role.COLOCATED, model)
        await connected(backend, Role.COLOCATED, full, other)
        results = await asyncio.gather(*(generate(backend, 2, str(i)) for i in range(4)))
        assert [len(tokens) for tokens in results] == [2] * 4
        assert [len(tokens) for tokens in await asyncio.gather(*longs)] == [300, 2]
        await assert_idle(full, other)
        await close(backend, full, other)

    run(scenario())


def test_who_is_refused_is_told_how_long_the_queue_takes() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        tight = EngineConfig(max_num_requests=1, max_waiting_requests=1)
        worker = await start(Role.COLOCATED, model, engine=tight)
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, worker)
        release = threading.Event()
        worker.engine.call(lambda _: release.wait(20))  # no step, so no news of the load
        admitted = asyncio.create_task(generate(backend, 2, "admitted"))
        await until(lambda: worker.num_requests == 1)
        view = backend._view.get(worker.card.incarnation)
        assert view is not None
        reports = view.updated_at
        for _ in range(10):  # a report from before may still be on its way
            view.load = msgspec.structs.replace(
                view.load, num_queued_tokens=3000, prefill_tokens_per_second=100.0
            )
            with pytest.raises(WorkerBusyError, match="waiting here already") as refused:
                await generate(backend, 2)
            if view.updated_at == reports:
                break
            reports = view.updated_at
        assert refused.value.retry_after_seconds == pytest.approx(30.0)
        release.set()
        assert len(await admitted) == 2
        await backend.stop_taking(40.0)
        with pytest.raises(ServiceStoppingError) as stopping:
            await generate(backend, 2)
        assert 39.0 < stopping.value.retry_after_seconds <= 40.0
        await assert_idle(worker)
        await close(backend, worker)

    run(scenario())


class Prompt(list[int]):
    """Unlike a plain list it can be watched."""


async def refused_prompt(backend: ClusterBackend) -> weakref.ref[Prompt]:
    prompt = Prompt(PROMPT)
    with pytest.raises(ServiceStoppingError):
        await anext(backend.generate("r", prompt, SamplingParams(2, temperature=0)))
    return weakref.ref(prompt)


def test_an_endpoint_that_stops_keeps_nothing_of_what_it_refuses() -> None:
    async def scenario() -> None:
        backend = backend_for(Role.COLOCATED)
        await backend.stop_taking(0.0)
        refused = [await refused_prompt(backend) for _ in range(3)]
        gc.collect()
        assert [prompt() for prompt in refused] == [None] * 3
        await close(backend)

    run(scenario())


def test_one_request_id_from_two_clients_keeps_them_apart() -> None:
    """Clients name their requests with X-Request-Id, and need not choose well."""
    model = tiny_model("llama")

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, model)
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, worker)
        results = await asyncio.gather(*(generate(backend, n, "same") for n in (30, 40, 50)))
        assert [len(tokens) for tokens in results] == [30, 40, 50]
        await close(backend, worker)

    run(scenario())


def test_a_worker_lost_before_the_first_token_is_replaced() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, 3)

    async def scenario() -> None:
        workers = [await start(Role.COLOCATED, model) for _ in range(2)]
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, *workers)
        release = threading.Event()
        for worker in workers:  # no token leaves before the event
            worker.engine.call(lambda _: release.wait(20))
        waiting = asyncio.create_task(generate(backend, 3))
        await until(lambda: sum(w.num_requests for w in workers) == 1)
        first, second = sorted(workers, key=lambda w: -w.num_requests)
        await first._server.close()
        await until(lambda: second.num_requests == 1)
        release.set()
        assert await waiting == expected
        await close(backend, *workers)

    run(scenario())


def test_a_request_waits_for_a_worker_that_was_just_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve drops the last worker of before in the message that lists its successor."""
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, 3)
    may_open = asyncio.Event()
    open_session = WorkerConnection.open

    async def open_later(card: WorkerCard, *rest: Any, **more: Any) -> WorkerConnection:
        if card.replica_id == successor_id:
            await may_open.wait()
        return await open_session(card, *rest, **more)

    successor_id = ""
    monkeypatch.setattr(WorkerConnection, "open", open_later)

    async def scenario() -> None:
        nonlocal successor_id
        before, successor = await start(Role.DECODE, model), await start(Role.DECODE, model)
        successor_id = successor.card.replica_id
        backend = backend_for(Role.DECODE)
        await connected(backend, Role.DECODE, before)
        show(backend, Role.DECODE, successor)
        answer = asyncio.create_task(generate(backend, 3))
        await asyncio.wait({answer}, timeout=0.2)
        assert not answer.done()
        may_open.set()
        assert await answer == expected
        assert successor.engine.stats.num_generated_tokens == 3
        await assert_idle(before, successor)
        await close(backend, before, successor)

    run(scenario())


@pytest.mark.parametrize("is_known", [True, False])
def test_a_request_waits_for_the_successor_of_a_worker_that_stops(is_known: bool) -> None:
    """A worker tells of its stop before Serve does, if not by telemetry, then by turning away."""
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, 3)

    async def scenario() -> None:
        before, successor = await start(Role.DECODE, model), await start(Role.DECODE, model)
        backend = backend_for(Role.DECODE)
        await connected(backend, Role.DECODE, before)
        view = backend._view.get(before.card.incarnation)
        assert view is not None
        draining = asyncio.create_task(before.drain(0.0))
        if is_known:
            await until(lambda: view.load.is_draining)
        else:
            await draining
        answer = asyncio.create_task(generate(backend, 3))
        await asyncio.wait({answer}, timeout=0.2)
        assert not answer.done()
        show(backend, Role.DECODE, successor)
        assert await answer == expected
        await draining
        await assert_idle(before, successor)
        await close(backend, before, successor)

    run(scenario())


def test_a_chat_planned_between_two_workers_fills_the_context_of_the_next() -> None:
    """Clients of a chat seldom set a limit; it is the rest of a context that is not known yet."""
    model = tiny_model("llama")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}

    async def scenario() -> None:
        before = await start(Role.DECODE, model, num_blocks=8)
        successor = await start(Role.DECODE, model, num_blocks=4)
        backend = backend_for(Role.DECODE)
        assert backend.max_context_tokens is None
        await connected(backend, Role.DECODE, before)
        await before.drain(0.0)
        show(backend, Role.DECODE)
        assert backend.max_context_tokens == before.card.max_context_tokens
        planner = Planner(backend, CharTokenizer())
        (choice,) = await planner.plan(ChatCompletionRequest.model_validate(body), 0.0)
        show(backend, Role.DECODE, successor)
        tokens = await collect(backend.generate("r", choice.prompt_token_ids, choice.sampling))
        context = successor.card.max_context_tokens
        assert context == backend.max_context_tokens
        assert context < before.card.max_context_tokens
        assert len(choice.prompt_token_ids) + len(tokens) == context
        await assert_idle(successor)
        await close(backend, before, successor)

    run(scenario())


def test_nobody_waits_long_for_a_worker_that_was_listed_and_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(worker_sessions, "ARRIVAL_SECONDS", 0.3)
    monkeypatch.setattr(cluster_backend, "ARRIVAL_SECONDS", 0.3)

    async def scenario() -> None:
        gone = await start(Role.DECODE, model)
        await gone.close()
        backend = backend_for(Role.DECODE)
        show(backend, Role.DECODE, gone)
        began_at = time.monotonic()
        with pytest.raises(NoWorkerError):
            await generate(backend, 3)
        assert 0.2 < time.monotonic() - began_at < 10
        began_at = time.monotonic()
        with pytest.raises(NoWorkerError):
            await generate(backend, 3)
        assert time.monotonic() - began_at < 0.2

        async def keep_listing() -> None:  # as a pool does whose workers end as soon as they run
            for index in range(100):
                card = msgspec.structs.replace(gone.card, incarnation=str(index))
                backend.set_workers(Role.DECODE, {card.replica_id: card})
                await asyncio.sleep(0.05)

        listing = asyncio.create_task(keep_listing())
        await until(lambda: backend.sessions.expect_worker(time.monotonic()))
        with pytest.raises(NoWorkerError):
            await generate(backend, 3)
        assert not listing.done()
        listing.cancel()
        await close(backend)

    run(scenario())


def test_a_client_that_goes_away_aborts_at_once() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, model)
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, worker)
        async with aclosing(
            backend.generate("r", PROMPT, SamplingParams(400, temperature=0))
        ) as outputs:
            await anext(outputs)
        connection = backend.sessions.get(worker.card.incarnation)
        assert connection is not None
        assert connection.num_requests == 0
        assert backend._policy.num_outstanding(worker.card.incarnation) == 0
        assert await until(lambda: worker.num_requests == 0) < 1.0
        await assert_idle(worker)
        await close(backend, worker)

    run(scenario())


def test_a_worker_that_leaves_finishes_and_may_be_listed_again() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, model)
        backend = backend_for(Role.COLOCATED)
        await connected(backend, Role.COLOCATED, worker)
        streaming = asyncio.create_task(generate(backend, 60))
        await until(lambda: worker.num_requests == 1)
        show(backend, Role.COLOCATED)
        assert not backend.is_ready()[0]
        with pytest.raises(NoWorkerError) as refused:
            await generate(backend, 2, "late")
        # What Serve needs, and what this worker's start took, which is next to nothing.
        assert 9.0 < refused.value.retry_after_seconds < 12.0
        again = msgspec.structs.replace(worker.card)  # equal, but another object
        backend.set_workers(Role.COLOCATED, {again.replica_id: again})
        assert len(await generate(backend, 2, "again")) == 2
        assert len(await streaming) == 60
        assert len(worker._server.sessions) == 1
        assert len(backend.sessions._tasks) == 1
        await close(backend, worker)

    run(scenario())


def test_a_prefill_worker_keeps_a_request_that_decode_has_no_room_for() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, 6)
    metrics = IngressMetrics()

    async def scenario() -> None:
        prefill, decode = await start(Role.PREFILL, model), await start(Role.DECODE, model)
        # No time between tokens is short enough, and a prefill worker that has computed nothing
        # yet is taken for a fast one: what decode strains goes there.
        router = RouterConfig(target_itl_seconds=1e-6)
        backend = ClusterBackend("tiny", router, {Role.PREFILL, Role.DECODE}, metrics)
        await connected(backend, Role.DECODE, decode)
        await connected(backend, Role.PREFILL, prefill)
        view = backend._view.get(decode.card.incarnation)
        assert view is not None
        slow = {"decode_base_seconds": 10.0, "decode_stream_seconds": 1.0}
        busy = msgspec.structs.replace(view.load, **slow)
        view.report(Telemetry(view.sequence, False, [], [], busy), view.updated_at)
        tokens: list[int] = []
        async for output in backend.generate("r", PROMPT, SamplingParams(6, temperature=0)):
            tokens += output.token_ids
        assert tokens == expected
        assert prefill.engine.stats.num_generated_tokens == 6
        assert decode.engine.stats.num_steps == 0
        decided = metrics.count("antiphon_router_decisions_total", reason="prefill_alone")
        assert decided == 1
        name = "antiphon_router_time_to_first_token_ratio_count"
        assert metrics.count(name, reason="prefill_alone") == 1
        await assert_idle(prefill, decode)
        await close(backend, prefill, decode)

    run(scenario())
