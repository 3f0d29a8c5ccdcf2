"""Times and rates of a hand-off mean what they say: a delay is seen where it is, and only there."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fault_cells import Step
from faulty_transport import FaultyLink, FaultyTransport, Message, Send
from memory_transport import MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import tiny_model

from antiphon.config import EngineConfig
from antiphon.messages import Role
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(41)]
SCATTER_SECONDS, WIRE_SECONDS = 0.3, 0.2


def slow_wire(step: Step, link: FaultyLink, message: Message, send: Send) -> None:
    if step in (Step.FIRST, Step.MIDDLE):
        time.sleep(WIRE_SECONDS)
    send(message)


def link_totals(worker: Worker) -> tuple[float, float]:
    """Bytes and seconds of its only link."""
    families = {family.name: family for family in worker.metrics.registry.collect()}
    names = ("antiphon_handoff_link_bytes", "antiphon_handoff_link_seconds")
    num_bytes, seconds = (sum(s.value for s in families[name].samples) for name in names)
    return num_bytes, seconds


async def hand_off(
    prepare: Callable[[Worker, Worker], None] = lambda prefill, decode: None,
    prompt: Sequence[int] = PROMPT,
    **hooks: Any,
) -> tuple[Worker, Worker]:
    """Two workers between which a prompt has gone in chunks of 16 tokens, and one before it."""
    model, network = tiny_model("llama"), MemoryNetwork()
    prefill = await start(
        Role.PREFILL,
        model,
        engine=EngineConfig(max_batch_tokens=16),
        transport=FaultyTransport(MemoryTransport(network, "p"), **hooks),
    )
    decode = await start(Role.DECODE, model, transport=MemoryTransport(network, "d"))
    client = await Client.connect(decode)
    await client.finish(client.submit([3, 4, 5], 2, peer_of(prefill)))  # makes the link
    before = [link_totals(worker) for worker in (prefill, decode)]
    prepare(prefill, decode)
    await client.finish(client.submit(list(prompt), 2, peer_of(prefill)))
    assert set(client.paths.values()) == {"remote"}
    await assert_idle(prefill, decode)
    await until(lambda: link_totals(decode)[0] == link_totals(prefill)[0] > before[0][0])
    await client.session.close()
    return prefill, decode


def slow_last_scatter(prefill: Worker, decode: Worker) -> None:
    store: Any = decode.generate.receiver._endpoint.store
    scatter = store.scatter

    def slow(block_table: Any, begin: int, end: int, segment: Any) -> None:
        if end == len(PROMPT) - 1:
            time.sleep(SCATTER_SECONDS)
        scatter(block_table, begin, end, segment)

    store.scatter = slow


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_what_a_first_token_waits_for_after_the_last_chunk_is_the_tail() -> None:
    async def scenario() -> None:
        prefill, decode = await hand_off(slow_last_scatter)
        count = decode.metrics.count
        tail = count("antiphon_handoff_tail_seconds_total")
        whole = count("antiphon_handoff_transfer_seconds_sum")
        assert SCATTER_SECONDS < tail <= whole + 0.1
        assert count("antiphon_handoff_landing_seconds_total") > SCATTER_SECONDS
        for worker in (prefill, decode):
            assert link_totals(worker)[1] < SCATTER_SECONDS / 2, "it had come by then"
            await worker.close()

    run(scenario())


def test_a_slow_wire_is_seen_at_both_ends() -> None:
    async def scenario() -> None:
        prefill, decode = await hand_off(on_send=slow_wire)
        num_segments = prefill.metrics.count("antiphon_handoff_segments_total")
        least = num_segments * WIRE_SECONDS
        assert num_segments >= 3
        (sent, at_sender), (received, at_receiver) = link_totals(prefill), link_totals(decode)
        assert sent == received > 0
        assert at_sender == pytest.approx(at_receiver)
        assert at_sender > least
        assert decode.metrics.count("antiphon_handoff_seconds_total") > least
        assert decode.metrics.count("antiphon_handoff_landing_seconds_total") < WIRE_SECONDS
        assert decode.metrics.count("antiphon_handoff_transfer_seconds_sum") > least
        for worker in (prefill, decode):
            await worker.close()

    run(scenario())


def test_copies_at_the_ends_are_no_time_on_the_link() -> None:
    def slow_gather(prefill: Worker, decode: Worker) -> None:
        store: Any = prefill.prefill._sender._endpoint.store
        gather = store.gather

        def slow(*arguments: Any) -> None:
            time.sleep(WIRE_SECONDS)
            gather(*arguments)

        store.gather = slow

    async def scenario() -> None:
        prefill, decode = await hand_off(slow_gather, PROMPT[:13])
        for worker in (prefill, decode):
            assert link_totals(worker)[1] < WIRE_SECONDS
        assert decode.metrics.count("antiphon_handoff_transfer_seconds_sum") > WIRE_SECONDS
        for worker in (prefill, decode):
            await worker.close()

    run(scenario())
