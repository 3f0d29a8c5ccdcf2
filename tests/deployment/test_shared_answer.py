"""The choices of one request over real workers: their turns, and what they share."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest
from pools import assert_idle, start, until
from tiny_models import oracle, tiny_model
from two_pools import close, http_client

from antiphon.config import EngineConfig, RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_generation import Choice, Generations
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journey import Journey
from antiphon.deployment.shared_answer import SharedAnswer
from antiphon.messages import Role, SamplingParams
from antiphon.router import telemetry_view
from antiphon.workers.worker import Worker

PROMPTS = [[5 + i] * 20 for i in range(8)]
TWO_AT_ONCE = EngineConfig(max_num_requests=1, max_waiting_requests=4)  # half of its queue
BODY = {"model": "tiny", "max_tokens": 3, "temperature": 0, "ignore_eos": True}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def show(backend: ClusterBackend, *workers: Worker) -> None:
    """Say that Serve lists exactly these workers."""
    backend.set_workers(Role.COLOCATED, {w.card.replica_id: w.card for w in workers})


async def system(metrics: IngressMetrics | None = None) -> tuple[ClusterBackend, Worker]:
    worker = await start(Role.COLOCATED, tiny_model("llama"), engine=TWO_AT_ONCE)
    metrics = metrics or IngressMetrics()
    backend = ClusterBackend("tiny", RouterConfig(), {Role.COLOCATED}, metrics)
    show(backend, worker)
    await until(lambda: backend.is_ready()[0])
    return backend, worker


class Choices:
    """Generations of one request that are being read, and what each has said."""

    def __init__(self, backend: ClusterBackend, prompts: list[list[int]], max_tokens: int) -> None:
        answer, sampling = SharedAnswer(), SamplingParams(max_tokens, temperature=0)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.choices = [
            Choice(prompt, sampling, True, Journey(0.0, len(prompt), answer)) for prompt in prompts
        ]
        self.task = asyncio.create_task(self._read(backend))

    async def _read(self, backend: ClusterBackend) -> None:
        num_open = len(self.choices)
        async with Generations(backend, "r", self.choices) as generations:
            while num_open:
                for index, output in await generations.batch():
                    self.tokens[index] += output.token_ids
                    num_open -= output.finish_reason is not None


def test_a_batch_larger_than_a_workers_queue_is_answered_in_order() -> None:
    metrics = IngressMetrics()

    async def scenario() -> None:
        backend, worker = await system(metrics)
        async with http_client(backend) as http:

            async def ask(prompt: Any, **more: Any) -> str:
                response = await http.post("/v1/completions", json=BODY | {"prompt": prompt} | more)
                assert response.status_code == 200, response.text
                return response.text

            alone = [json.loads(await ask(prompt))["choices"][0]["text"] for prompt in PROMPTS]
            whole = json.loads(await ask(PROMPTS, n=2))
            assert [choice["index"] for choice in whole["choices"]] == list(range(16))
            texts = [choice["text"] for choice in whole["choices"]]
            assert texts == [text for text in alone for _ in range(2)]
            usage = whole["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (8 * 20, 16 * 3)

            streamed = [""] * len(PROMPTS)
            *events, done = (await ask(PROMPTS, stream=True)).strip().split("\n\n")
            for event in events:
                for choice in json.loads(event.removeprefix("data: "))["choices"]:
                    streamed[choice["index"]] += choice["text"]
            assert (streamed, done) == (alone, "data: [DONE]")
        assert metrics.count("antiphon_refusals_total", reason="busy") == 0
        await assert_idle(worker)
        await close(backend, worker)

    run(scenario())


def test_a_client_that_leaves_ends_choices_that_wait_for_their_turn() -> None:
    async def scenario() -> None:
        backend, worker = await system()
        reading = Choices(backend, PROMPTS, max_tokens=300)
        await until(lambda: bool(reading.tokens[0]))
        assert (backend._num_open, worker.num_requests) == (8, 2)
        reading.task.cancel()
        await asyncio.wait({reading.task}, timeout=10)
        assert backend._num_open == 0
        await assert_idle(worker)
        await close(backend, worker)

    run(scenario())


def test_an_endpoint_that_stops_finishes_choices_that_wait_for_their_turn() -> None:
    async def scenario() -> None:
        backend, worker = await system()
        reading = Choices(backend, PROMPTS, max_tokens=5)
        await until(lambda: bool(reading.tokens[0]))
        await backend.stop_taking(30.0)
        await reading.task
        assert [len(tokens) for tokens in reading.tokens] == [5] * 8
        await close(backend, worker)

    run(scenario())


def test_a_choice_that_was_queued_waits_for_a_successor_as_its_siblings_do() -> None:
    expected = [oracle(tiny_model("llama"), prompt, 60) for prompt in PROMPTS[:3]]

    async def scenario() -> None:
        backend, worker = await system()
        reading = Choices(backend, PROMPTS[:3], max_tokens=60)
        await until(lambda: bool(reading.tokens[0]))
        for session in tuple(worker._server.sessions):
            session.cut()
        show(backend)
        await until(lambda: not backend.view.decode_workers)
        assert [bool(tokens) for tokens in reading.tokens] == [True, False, False]
        await worker.close()
        successor = await start(Role.COLOCATED, tiny_model("llama"), engine=TWO_AT_ONCE)
        assert not reading.task.done()
        show(backend, successor)
        await reading.task
        assert reading.tokens == expected
        await assert_idle(successor)
        await close(backend, successor)

    run(scenario())


def test_choices_of_one_prompt_hash_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    hash_prompt = telemetry_view.hash_prompt

    def counted(token_ids: Any, block_sizes: Any) -> Any:
        hashed.append(len(token_ids))
        return hash_prompt(token_ids, block_sizes)

    monkeypatch.setattr(telemetry_view, "hash_prompt", counted)

    async def scenario() -> None:
        backend, worker = await system()
        reading = Choices(backend, [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, max_tokens=2)
        await reading.task
        assert len(hashed) == 2
        await close(backend, worker)

    run(scenario())
