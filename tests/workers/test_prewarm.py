"""Links are there before the first request wants them, and nothing depends on it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from crew import total
from memory_transport import MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import tiny_model

from antiphon.config import HandoffConfig
from antiphon.messages import PrefillPeer, PrefillPool, Role


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def pool_of(num_prefill: int, max_links: int = 64) -> tuple[list[Any], Any, Client]:
    network, model = MemoryNetwork(), tiny_model("llama")
    prefill = [
        await start(Role.PREFILL, model, transport=MemoryTransport(network, f"p{index}"))
        for index in range(num_prefill)
    ]
    handoff = HandoffConfig(max_links=max_links)
    decode = await start(
        Role.DECODE, model, handoff=handoff, transport=MemoryTransport(network, "d")
    )
    return prefill, decode, await Client.connect(decode)


async def close(*closing: Any) -> None:
    for one in closing:
        await one.close()


def test_the_first_request_finds_its_link() -> None:
    async def scenario() -> None:
        (prefill,), decode, client = await pool_of(1)
        client.session.send(PrefillPool((peer_of(prefill),)))
        receiver = decode.generate.receiver
        await until(lambda: receiver.counters().prewarmed_links == 1)
        request_id = client.submit([5] * 40, 2, peer_of(prefill))
        await client.finish(request_id)
        assert client.paths[request_id] == "remote"
        client.session.send(PrefillPool((peer_of(prefill),)))  # known: nothing is made
        await client.finish(client.submit([6] * 40, 2, peer_of(prefill)))
        assert receiver.counters().links_made == 1
        rendered = prefill.metrics.render().decode()
        assert 'antiphon_handoff_links_prewarmed_total{role="prefill"} 1.0' in rendered
        assert 'antiphon_handoff_transfers_total{role="prefill"} 2.0' in rendered
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_the_newest_come_first_and_the_bound_holds() -> None:
    async def scenario() -> None:
        prefill, decode, client = await pool_of(3, max_links=2)
        client.session.send(PrefillPool(tuple(map(peer_of, prefill))))
        receiver = decode.generate.receiver
        await until(lambda: receiver.counters().prewarmed_links == 2)
        links = {link.peer_incarnation for link in receiver._links}
        assert links == {worker.card.incarnation for worker in prefill[1:]}
        # A link that nobody uses makes room for one that a request wants.
        request_id = client.submit([5] * 40, 2, peer_of(prefill[0]))
        await client.finish(request_id)
        assert client.paths[request_id] == "remote"
        assert receiver.num_links == 2
        await close(client.session, *prefill, decode)

    run(scenario())


def test_a_peer_that_cannot_be_reached_is_counted_and_passed_over() -> None:
    async def scenario() -> None:
        (prefill,), decode, client = await pool_of(1)
        nowhere = PrefillPeer("ws://127.0.0.1:9/session", "gone")
        client.session.send(PrefillPool((peer_of(prefill), nowhere)))
        await until(lambda: decode.generate.receiver.counters().prewarmed_links == 1)
        failures = "antiphon_handoff_prewarm_failures_total"
        assert decode.metrics.count(failures, reason="unreachable") == 1
        assert total(decode.metrics, failures) == 1
        await close(client.session, prefill, decode)

    run(scenario())
