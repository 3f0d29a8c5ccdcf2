"""Nine ways in which systems of this kind have failed in public, each held against this one.

The seventh, decode under pressure, is in test_nine_bursts.py.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from crew import total, watch
from memory_transport import Fault, FaultPlan
from msgspec import structs
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import oracle, tiny_model
from two_pools import (
    CHUNK_TOKENS,
    SLOW_STEP_SECONDS,
    backend_over,
    close,
    fail_step,
    generate,
    http_client,
    pair,
)

from antiphon.config import EngineConfig, HandoffConfig
from antiphon.messages import PrefillPeer, Role
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(45)]
OTHER_PROMPT = [120 - i for i in range(45)]
BODY = {"model": "tiny", "prompt": "tell me more about it", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_a_late_write_cannot_reach_blocks_that_were_given_to_another_request(model: Any) -> None:
    """A write that was still under way landed in blocks of the next request (vLLM PR 32255)."""
    expected = oracle(model, OTHER_PROMPT, 18)

    async def scenario() -> None:
        plan = FaultPlan({1: Fault.HOLD})  # the first segment
        prefill, decode, client = await pair(model, plan, num_blocks=4, prefix_cache=False)
        left = client.submit(PROMPT, 8, peer_of(prefill))
        await until(lambda: prefill.engine.stats.num_prompt_tokens == len(PROMPT) - 1)
        client.abort(left)
        await until(lambda: decode.num_requests == 0)
        watch(decode, lambda batch: time.sleep(SLOW_STEP_SECONDS))
        heir = client.submit(OTHER_PROMPT, 18)  # needs all four blocks
        await client.wait_until(lambda: len(client.tokens[heir]) > 2)
        plan.release()
        counters = decode.generate.receiver.counters
        await until(lambda: counters().discarded_segments.get("unknown_transfer", 0) > 0)
        assert heir not in client.ended
        assert await client.finish(heir) == [expected]
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


@pytest.mark.parametrize("side", ["client", "session", "prefill", "link"])
def test_blocks_return_when_a_transfer_is_aborted_on_either_side(model: Any, side: str) -> None:
    """Blocks of aborted transfers were never freed (vllm#46283, vLLM PR 41269 and PR 50754)."""

    async def scenario() -> None:
        plan = FaultPlan({1: Fault.BREAK_BEFORE if side == "link" else Fault.HOLD})
        prefill, decode, client = await pair(model, plan, num_blocks=4, prefix_cache=False)
        if side == "prefill":
            watch(prefill, fail_step(1))
        for number in range(5):  # each needs nearly all of the blocks
            prompt = [5 + (number + i) % 100 for i in range(45)]
            request_id = client.submit(prompt, 2, peer_of(prefill))
            if side in ("client", "session"):
                await until(lambda: prefill.num_requests == 1)
            if side == "client":
                client.abort(request_id)
            elif side == "session":
                await client.session.close()
                client = await Client.connect(decode)
            else:
                await client.finish(request_id)
            await until(lambda: decode.num_requests == 0)
            plan.release()
            await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


@pytest.mark.parametrize("num_chunks", [0, 1, 2])
def test_decode_never_goes_on_from_incomplete_kv(model: Any, num_chunks: int) -> None:
    """Decode went on after prefill had aborted (sglang#30233), or recomputed and answered wrongly
    (vllm#49250)."""
    expected = oracle(model, PROMPT, 8)

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        watch(prefill, fail_step(num_chunks))
        request_id = client.submit(PROMPT, 8, peer_of(prefill))
        assert await client.finish(request_id) == [expected]
        assert client.paths[request_id] == "fallback"
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_restarted_worker_under_the_old_name_is_a_stranger(model: Any, role: Role) -> None:
    """A worker that came back under its name crashed its peers (vllm#49238), kept index entries of
    its earlier life (llm-d-router#2853), or failed nearly every request (smg#2382)."""
    expected, other_expected = oracle(model, PROMPT, 8), oracle(model, OTHER_PROMPT, 8)

    async def scenario() -> None:
        workers = {each: await start(each, model) for each in (Role.PREFILL, Role.DECODE)}
        backend = await backend_over(*workers.values())
        assert await generate(backend, PROMPT) == expected
        before = workers[role]
        prompt = backend._view.hash_prompt(PROMPT)
        await until(
            lambda: (
                before.card.incarnation in backend._view.match(prompt, time.monotonic()).confirmed
            )
        )
        await before.close()
        workers[role] = await start(role, model)
        card = structs.replace(workers[role].card, replica_id=before.card.replica_id)
        backend.set_workers(role, {card.replica_id: card})
        await until(lambda: backend._view.get(card.incarnation) is not None)
        assert (
            backend._view.match(prompt, time.monotonic())
            .confirmed.keys()
            .isdisjoint({before.card.incarnation, card.incarnation})
        )
        assert await generate(backend, PROMPT) == expected
        card = workers[Role.PREFILL].card
        stale = PrefillPeer(card.url, "its earlier life", session_key=card.session_key)
        client = await Client.connect(workers[Role.DECODE])
        assert await client.finish(client.submit(OTHER_PROMPT, 8, stale)) == [other_expected]
        await assert_idle(*workers.values())
        await close(client.session, backend, *workers.values())

    run(scenario())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_no_failure_is_answered_as_a_success(model: Any, streams: bool, num_steps: int) -> None:
    """Failures came as HTTP 200 with the finish reason "error" (smg#2382)."""

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, model)
        watch(worker, fail_step(num_steps))
        backend = await backend_over(worker)
        async with http_client(backend) as http:
            answer = await http.post("/v1/completions", json={**BODY, "stream": streams})
            if streams and num_steps:  # the status had to be said with the first token
                assert answer.status_code == 200
                assert '"error"' in answer.text
                assert "[DONE]" not in answer.text
            else:
                assert answer.status_code >= 500
                assert answer.json()["error"]["message"]
            assert '"finish_reason":"' not in answer.text.replace(" ", "")
            await worker.close()
            await until(lambda: not backend.sessions.connected)
            backend.set_workers(Role.COLOCATED, {})  # nor expected: a request would wait 5 s
            answer = await http.post("/v1/completions", json=BODY)
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
        await backend.close()

    run(scenario())


def test_sampling_is_not_bent_on_its_way_through_prefill(model: Any) -> None:
    """Seeds, n, stop rules, min_tokens and grammars were lost or clamped where prefill samples too
    (several; Ray Serve LLM answered 400 to a legal min_tokens)."""
    bodies = [
        {**BODY, "temperature": 0.9, "seed": 7, "n": 3},
        {**BODY, "temperature": 1.3, "top_p": 0.8, "top_k": 20, "seed": 2**40, "max_tokens": 12},
        {**BODY, "max_tokens": 1},
        {**BODY, "max_tokens": 30, "stop": ["a", "q"]},
        {**BODY, "min_tokens": 4},
        {**BODY, "logprobs": 2},
        {**BODY, "response_format": {"type": "json_object"}},
        {**BODY, "guided_json": {"type": "object"}},
    ]

    async def answers(*workers: Worker) -> list[Any]:
        backend = await backend_over(*workers)
        async with http_client(backend) as http:
            replies = [await http.post("/v1/completions", json=body) for body in bodies]
        await assert_idle(*workers)
        await close(backend, *workers)
        return [(r.status_code, r.json().get("choices"), r.json().get("error")) for r in replies]

    async def scenario() -> None:
        through_one = await answers(await start(Role.COLOCATED, model))
        prefill, decode = await start(Role.PREFILL, model), await start(Role.DECODE, model)
        through_two = await answers(prefill, decode)
        assert prefill.engine.stats.num_prompt_tokens > 0
        assert through_two == through_one
        # What is not served is refused by name, not bent.
        assert [status for status, *_ in through_two] == [200] * 4 + [400] * 4
        assert "response_format" in through_two[6][2]["message"]
        assert len({choice["text"] for choice in through_two[0][1]}) == 3

    run(scenario())


def test_work_for_a_client_that_has_left_stops_on_both_pools(model: Any) -> None:
    """Prefill was never told that the client is gone and computed on (Ray Serve LLM)."""

    async def scenario() -> None:
        chunks = EngineConfig(max_batch_tokens=CHUNK_TOKENS)
        prefill = await start(Role.PREFILL, model, engine=chunks)
        decode = await start(Role.DECODE, model)
        backend = await backend_over(prefill, decode)
        watch(prefill, lambda batch: time.sleep(SLOW_STEP_SECONDS))
        prompt = [5 + i % 100 for i in range(400)]

        asking = asyncio.create_task(generate(backend, prompt))
        await until(lambda: prefill.engine.stats.num_prompt_tokens >= 2 * CHUNK_TOKENS)
        asking.cancel()
        await asyncio.wait({asking})
        assert await until(lambda: prefill.num_requests + decode.num_requests == 0) < 1.0
        await assert_idle(prefill, decode)
        assert prefill.engine.stats.num_prompt_tokens < len(prompt) / 2
        await close(backend, prefill, decode)

    run(scenario())


def test_no_fallback_is_silent(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Silent fallbacks hid outages, so Dynamo and llm-d took theirs out.

    The other rungs are in tests/deployment: test_no_headroom.py, test_replay_between_workers.py.
    """

    async def scenario() -> None:
        decode = await start(Role.DECODE, model, handoff=HandoffConfig())
        client = await Client.connect(decode)
        nowhere = PrefillPeer("ws://127.0.0.1:9/session", "gone")
        with caplog.at_level(logging.WARNING):
            ids = [client.submit([5 + n, *PROMPT], 2, nowhere) for n in range(3)]
            await client.finish(*ids)
        assert [client.paths[request_id] for request_id in ids] == ["fallback"] * 3
        assert total(decode.metrics, "antiphon_prefill_fallbacks_total") == 3
        for request_id in ids:
            lines = [line for line in caplog.messages if request_id in line]
            assert any("computing 45 tokens here" in line for line in lines), lines
            assert not any(str(PROMPT[:3])[1:-1] in line for line in caplog.messages)
        await assert_idle(decode)
        await close(client.session, decode)

    run(scenario())
