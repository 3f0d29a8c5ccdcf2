"""A request's id finds what every worker says of it, and each rung is counted as what it was."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import pytest
from crew import total
from memory_transport import Fault, FaultPlan
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import tiny_model
from two_pools import close, pair

from antiphon.messages import Role
from antiphon.workers import prefill_ladder, prefill_service
from antiphon.workers.handoff import link_log
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(41)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def lines(caplog: pytest.LogCaptureFixture, module: Any, *words: str) -> list[str]:
    texts = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    return [text for text in texts if all(word in text for word in words)]


async def falls_back(decode: Worker, client: Client, peer: Any, reason: str) -> str:
    """Ask, and see the attempt and the fallback counted, each once and under this word."""
    request_id = client.submit(PROMPT, 2, peer)
    await client.finish(request_id)
    assert client.paths[request_id] == "fallback"
    for name, label in ("antiphon_prefill_attempts_total", "outcome"), (
        "antiphon_prefill_fallbacks_total", "reason",
    ):  # fmt: skip
        assert decode.metrics.count(name, **{label: reason}) == total(decode.metrics, name) == 1
    return request_id


def test_a_broken_link_is_found_by_the_request_at_both_workers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        plan = FaultPlan({2: Fault.BREAK_BEFORE})
        prefill, decode, client = await pair(tiny_model("llama"), plan)
        request_id = await falls_back(decode, client, peer_of(prefill), "lost")
        await assert_idle(prefill, decode)
        (here,) = lines(caplog, prefill_ladder, request_id, "prefill attempt 1", "lost")
        transfer_id = here.partition("transfer ")[2][:32]
        assert len(lines(caplog, prefill_ladder, request_id, "computing")) == 1
        (there,) = lines(caplog, prefill_service, request_id, transfer_id, "failed")
        assert decode.card.replica_id in there
        await until(lambda: len(lines(caplog, link_log, "broke")) == 2)
        (at_sender,) = lines(caplog, link_log, "broke", decode.card.replica_id)
        assert transfer_id in at_sender  # at the receiver the session may have been faster
        assert len(lines(caplog, link_log, "broke", prefill.card.replica_id)) == 1
        assert not any(str(PROMPT[:3])[1:-1] in line for line in caplog.messages)
        await close(client.session, prefill, decode)

    caplog.set_level(logging.INFO)
    run(scenario())


def test_a_prompt_that_a_prefill_worker_cannot_take_is_refused_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        model = tiny_model("llama")
        small = await start(Role.PREFILL, model, num_blocks=2)
        decode = await start(Role.DECODE, model)
        client = await Client.connect(decode)
        request_id = await falls_back(decode, client, peer_of(small), "refused")
        (line,) = lines(caplog, prefill_service, request_id, "refused")
        assert decode.card.replica_id in line
        await assert_idle(small, decode)
        await close(client.session, small, decode)

    run(scenario())
