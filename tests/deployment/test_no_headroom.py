"""Down the ladder over HTTP: prefill dies, the only decode worker has room for one of its prompts.

Each rung is counted and leaves a line. The ninth of the nine failures in tests/faults/test_nine.py
is that of fallbacks that nobody sees; the rung of the ingress is in test_replay_between_workers.py.
"""

import asyncio
import logging
import threading
from typing import Any

import httpx
import pytest
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport
from pools import assert_idle, start, until
from tiny_models import tiny_model
from two_pools import backend_over, close, http_client

from antiphon.config import HandoffConfig
from antiphon.messages import Role
from antiphon.workers.worker import Worker

NUM_PROMPT_TOKENS = 40
MAX_FALLBACK_TOKENS = 70  # for one prompt, and not for a second one behind it


async def _workers(plan: FaultPlan) -> tuple[Worker, Worker]:
    network = MemoryNetwork()
    return (
        await start(
            Role.PREFILL, tiny_model("llama"), transport=MemoryTransport(network, "p", plan)
        ),
        await start(
            Role.DECODE,
            tiny_model("llama"),
            handoff=HandoffConfig(max_fallback_tokens=MAX_FALLBACK_TOKENS),
            transport=MemoryTransport(network, "d"),
        ),
    )


async def _die(prefill: Worker, decode: Worker, num_awaited: int) -> None:
    """Let prefill die, and decode hear of all the prompts that are lost with it in one step."""
    gate = threading.Event()
    decode.engine.call(lambda _: gate.wait(20))
    await prefill._server.close()
    await until(lambda: decode.engine._commands.qsize() == num_awaited)
    gate.set()


def _body(first_token: int) -> dict[str, Any]:
    prompt = [first_token] * NUM_PROMPT_TOKENS
    return {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}


def test_without_prefill_and_headroom_the_answer_is_503_and_when_to_come_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        plan = FaultPlan({1: Fault.HOLD})  # the first segment
        prefill, decode = await _workers(plan)
        backend = await backend_over(prefill, decode)
        async with http_client(backend) as http:
            asking = [
                asyncio.create_task(
                    http.post(
                        "/v1/completions",
                        json=_body(5 + number),
                        headers={"X-Request-Id": f"request-{number}"},
                    )
                )
                for number in range(3)
            ]
            await until(lambda: decode.generate.receiver.num_pending == len(asking))
            await _die(prefill, decode, len(asking))
            answers = [await each for each in asking]
            _check(answers, decode, caplog)
            plan.release()
            await assert_idle(decode)
        await close(backend, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def _check(answers: list[httpx.Response], decode: Worker, caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    count = decode.metrics.count
    assert count("antiphon_prefill_attempts_total", outcome="lost") == 3
    assert count("antiphon_prefill_fallbacks_total", reason="lost") == 1
    assert count("antiphon_worker_refusals_total", reason="no_headroom") == 2
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for number, answer in enumerate(answers):
        own = [line for line in lines if line.startswith(f"request request-{number}-")]
        assert any("prefill attempt 1, at " in line and ", lost: " in line for line in own), own
        falls_back = f"computing {NUM_PROMPT_TOKENS - 1} tokens here: lost"
        assert any(falls_back in line for line in own) == (answer.status_code == 200), own
        if answer.status_code == 200:
            continue
        assert any("refused, its KV cannot be had" in line for line in own), own
        assert any("busy at decode" in line for line in own), own
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"]["message"]
