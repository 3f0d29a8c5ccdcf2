"""The services of both pools at the edges: what must be refused, kept, or never waited for."""

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any

import pytest
from memory_transport import MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start, until
from session_proxy import SessionProxy
from tiny_models import oracle, tiny_model

from antiphon.config import EngineConfig
from antiphon.errors import HandoffError, WorkerBusyError
from antiphon.messages import LinkOffer, Prefill, PrefillPeer, Role, SamplingParams, Submit
from antiphon.workers.handoff.sender import HandoffSender
from antiphon.workers.peers import Peers

MAX_TOKENS = 4


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def pair(model: Any, num_prefill_blocks: int = 64) -> tuple[Any, Any, Client]:
    network = MemoryNetwork()
    prefill = await start(
        Role.PREFILL,
        model,
        engine=EngineConfig(max_batch_tokens=16),
        num_blocks=num_prefill_blocks,
        transport=MemoryTransport(network, "p"),
    )
    decode = await start(Role.DECODE, model, transport=MemoryTransport(network, "d"))
    return prefill, decode, await Client.connect(decode)


async def close(*closing: Any) -> None:
    for one in closing:
        await one.close()


def test_what_arrived_behind_a_cached_prefix_is_not_computed_again() -> None:
    model = tiny_model("llama")
    prompt = [5 + i for i in range(40)]
    longer = prompt[:32] + [99 - i for i in range(20)]
    expected = oracle(model, longer, MAX_TOKENS)

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        await client.finish(client.submit(prompt, 1, peer_of(prefill)))
        request_id = client.submit(longer, MAX_TOKENS, peer_of(prefill))
        assert await client.finish(request_id) == [expected]
        assert client.paths[request_id] == "remote"
        assert decode.engine.stats.num_prompt_tokens == 0
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_a_prompt_that_the_prefill_cache_cannot_hold_delays_nobody() -> None:
    model = tiny_model("llama")
    expected = oracle(model, [5] * 60, MAX_TOKENS)

    async def scenario() -> None:
        prefill, decode, client = await pair(model, num_prefill_blocks=2)
        too_long = client.submit([5] * 60, MAX_TOKENS, peer_of(prefill))
        fits = client.submit([6] * 20, MAX_TOKENS, peer_of(prefill))
        tokens, _ = await client.finish(too_long, fits)
        assert tokens == expected
        assert client.paths == {too_long: "fallback", fits: "remote"}
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_a_session_that_is_lost_takes_its_link_along() -> None:
    """Where packets vanish nothing else would end it, at either end."""
    model = tiny_model("llama")
    prompts = [[seed + i for i in range(40)] for seed in (5, 50)]
    expected = [oracle(model, prompt, MAX_TOKENS) for prompt in prompts]

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        proxy = SessionProxy(prefill.card.url)
        card = prefill.card
        peer = PrefillPeer(
            await proxy.listen(), card.incarnation, card.replica_id, card.session_key
        )
        sender, receiver = prefill.prefill._sender, decode.generate.receiver
        assert await client.finish(client.submit(prompts[0], MAX_TOKENS, peer)) == [expected[0]]
        assert sender.num_links == receiver.num_links == 1
        proxy.cut()
        await until(lambda: sender.num_links == receiver.num_links == 0)
        request_id = client.submit(prompts[1], MAX_TOKENS, peer)
        assert await client.finish(request_id) == [expected[1]]
        assert client.paths[request_id] == "remote"
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode, proxy)

    run(scenario())


def test_a_malformed_request_is_refused_and_its_neighbours_go_on() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        neighbour = client.submit([5] * 10, 60)
        bad = [client.submit(prompt, 2) for prompt in ([-1], [2**40], [131])]
        seeded = Submit("seeded", [5], SamplingParams(2, seed=2**63))
        client.session.send(seeded)
        asker = await Client.connect(prefill)
        offer = LinkOffer("d", "link", decode.card.incarnation)
        for transfer_id, prompt in (("zz", [5, 6]), (uuid.uuid4().hex, [5, -6])):
            asker.session.send(Prefill(transfer_id, prompt, 0, offer))
        await client.finish(*bad, "seeded", neighbour)
        await asker.wait_until(lambda: len(asker.ended) == 2)
        assert {client.ended[i].split(":")[0] for i in [*bad, "seeded"]} == {"invalid"}
        assert {reason.split(":")[0] for reason in asker.ended.values()} == {"invalid"}
        assert client.ended[neighbour] == "length"
        assert prefill.is_healthy
        assert decode.is_healthy
        await assert_idle(prefill, decode)
        await close(client.session, asker.session, prefill, decode)

    run(scenario())


def test_a_link_that_breaks_before_the_request_is_queued_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The transfer's end may be reported while its request is still being handed to the engine."""
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        service = prefill.prefill

        def open_and_break(self: HandoffSender, transfer_id: str, offer: Any, first: int) -> None:
            service.on_transfer_ended(transfer_id, HandoffError("the link broke"), 0, 0.0)

        monkeypatch.setattr(HandoffSender, "open", open_and_break)
        request_id = client.submit([5] * 40, MAX_TOKENS, peer_of(prefill))
        await client.finish(request_id)
        assert client.paths[request_id] == "fallback"
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_a_refusal_overtakes_the_end_of_its_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the link it would be a failure, for which a worker is shunned longer."""
    model = tiny_model("llama")
    refused_at: list[float] = []
    aborted_at: list[float] = []
    abort = HandoffSender.abort

    def timed_abort(self: HandoffSender, transfer_id: str, reason: str) -> None:
        aborted_at.append(time.monotonic())
        abort(self, transfer_id, reason)

    def fill_up(request: Any) -> None:
        refused_at.append(time.monotonic())
        raise WorkerBusyError("the queue is full since a moment ago")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        await client.finish(client.submit([6] * 40, MAX_TOKENS, peer_of(prefill)))  # makes the link
        monkeypatch.setattr(HandoffSender, "abort", timed_abort)
        monkeypatch.setattr(prefill.engine, "add", fill_up)
        request_id = client.submit([5] * 40, MAX_TOKENS, peer_of(prefill))
        await client.finish(request_id)
        assert client.paths[request_id] == "fallback"
        assert decode.metrics.count("antiphon_prefill_attempts_total", outcome="busy") == 1
        assert prefill.metrics.count("antiphon_worker_refusals_total", reason="queue_full") == 1
        await assert_idle(prefill, decode)
        assert aborted_at[0] - refused_at[0] > 0.04
        await close(client.session, prefill, decode)

    run(scenario())


def test_an_unforeseen_failure_to_ask_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)

        async def fail(*args: Any) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(Peers, "get", fail)
        request_id = client.submit([5] * 40, MAX_TOKENS, peer_of(prefill))
        await client.finish(request_id)
        assert client.paths[request_id] == "fallback"
        assert decode.metrics.count("antiphon_prefill_fallbacks_total", reason="failed") == 1
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_an_abort_while_the_prefill_worker_is_being_connected_frees_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        connecting = asyncio.Event()

        async def hang(*args: Any) -> None:
            connecting.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Peers, "get", hang)
        request_id = client.submit([5] * 40, MAX_TOKENS, peer_of(prefill))
        await connecting.wait()
        client.abort(request_id)
        assert await until(lambda: decode.num_requests == 0) < 1.0
        await assert_idle(prefill, decode)
        await close(client.session, prefill, decode)

    run(scenario())


def test_aborts_at_any_moment_free_everything() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        for delay in range(12):
            request_ids = [
                client.submit([5 + delay, i] * 25, 50, peer_of(prefill)) for i in range(3)
            ]
            await asyncio.sleep(delay * 0.004)
            for request_id in request_ids:
                client.abort(request_id)
        await assert_idle(prefill, decode)
        await client.finish(last := client.submit([5] * 20, 2, peer_of(prefill)))
        assert client.paths[last] == "remote"
        await close(client.session, prefill, decode)

    run(scenario())
