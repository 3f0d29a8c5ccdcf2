"""A prompt prefilled on one worker and decoded on another gives what generate() gives."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from memory_transport import Fault, FaultPlan
from msgspec import structs
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import VOCAB_SIZE, oracle, tiny_model
from two_pools import pair

from antiphon.config import EngineConfig
from antiphon.messages import PrefillPeer, Role

MAX_TOKENS = 8
FAMILIES = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_moe"]


def prompts(seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 2, 5, 16, 17, 33, 45]
    made = [rng.choices(range(3, VOCAB_SIZE), k=n) for n in lengths]
    return [*made, made[-1][:32] + rng.choices(range(3, VOCAB_SIZE), k=6)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(16, 16, 512), (4, 16, 5), (8, 1, 16)], ids=str)
def test_greedy_output_equals_generate(family: str, sizes: tuple[int, int, int]) -> None:
    """Block sizes of the pools differ; prompts are chunked, packed, repeated from the caches."""
    model = tiny_model(family)
    expected = [oracle(model, prompt, MAX_TOKENS) for prompt in prompts()]
    prefill_block, decode_block, budget = sizes

    async def scenario() -> None:
        prefill = await start(
            Role.PREFILL,
            model,
            engine=EngineConfig(block_size=prefill_block, max_batch_tokens=budget),
            num_blocks=512 // prefill_block,
        )
        decode = await start(
            Role.DECODE,
            model,
            engine=EngineConfig(block_size=decode_block, max_batch_tokens=budget),
            num_blocks=768 // decode_block,
        )
        client = await Client.connect(decode)
        for _ in range(2):
            ids = [client.submit(p, MAX_TOKENS, peer_of(prefill)) for p in prompts()]
            assert await client.finish(*ids) == expected
        assert client.paths[ids[0]] == "local", "one token leaves nothing to prefill"
        assert decode.metrics.count("antiphon_prefill_fallbacks_total", reason="failed") == 0
        await assert_idle(prefill, decode)
        for closing in (client.session, prefill, decode):
            await closing.close()

    run(scenario())


def test_only_what_decode_lacks_crosses() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        prompt = prompts()[-2]
        await client.finish(client.submit(prompt, MAX_TOKENS, peer_of(prefill)))
        first = decode.generate.receiver.counters().received_bytes
        assert first == 44 * decode.card.wire_bytes_per_token
        longer = prompt[:40] + [5] * 10
        await client.finish(client.submit(longer, MAX_TOKENS, peer_of(prefill)))
        second = decode.generate.receiver.counters().received_bytes - first
        assert second == (49 - 32) * decode.card.wire_bytes_per_token
        await assert_idle(prefill, decode)
        for closing in (client.session, prefill, decode):
            await closing.close()

    run(scenario())


def test_unreachable_and_restarted_prefill_workers_are_done_without() -> None:
    model = tiny_model("llama")
    prompt = prompts()[-2]
    expected = oracle(model, prompt, MAX_TOKENS)

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        nowhere = PrefillPeer("ws://127.0.0.1:9/session", "gone")
        stranger = structs.replace(peer_of(prefill), incarnation="an earlier incarnation")
        for peer in (nowhere, stranger):
            request_id = client.submit(prompt, MAX_TOKENS, peer)
            assert await client.finish(request_id) == [expected]
        assert decode.metrics.count("antiphon_prefill_fallbacks_total", reason="unreachable") == 2
        await assert_idle(prefill, decode)
        for closing in (client.session, prefill, decode):
            await closing.close()

    run(scenario())


@pytest.mark.parametrize("when", ["awaiting KV", "decoding"])
@pytest.mark.parametrize("how", ["abort", "disconnect"])
def test_a_client_that_leaves_frees_both_pools_within_a_second(when: str, how: str) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        plan = FaultPlan({2: Fault.HOLD} if when == "awaiting KV" else {})
        prefill, decode, client = await pair(model, plan)
        prompt = prompts()[-2]
        request_id = client.submit(prompt, 400, peer_of(prefill))
        if when == "awaiting KV":
            await until(lambda: decode.generate.receiver.counters().segments > 0)
        else:
            await client.wait_until(lambda: len(client.tokens[request_id]) > 2)
        if how == "abort":
            client.abort(request_id)
        else:
            await client.session.close()
        assert await until(lambda: decode.num_requests == 0) < 1.0
        plan.release()
        assert await until(lambda: prefill.num_requests == 0) < 1.0
        await assert_idle(prefill, decode)
        for closing in (client.session, prefill, decode):
            await closing.close()

    run(scenario())


def test_bad_and_excess_requests_are_refused_with_a_reason() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        engine = EngineConfig(max_num_requests=1, max_waiting_requests=1)
        decode = await start(Role.DECODE, model, engine=engine, num_blocks=32)
        client = await Client.connect(decode)
        too_long = client.submit([5] * 10, 600)
        empty = client.submit([], 5)
        await client.finish(too_long, empty)
        assert client.ended[too_long] == (
            "invalid: 10 prompt tokens and max_tokens 600 exceed this worker's context of 512"
        )
        assert client.ended[empty].startswith("invalid: a request needs a prompt")
        running = client.submit([5] * 10, 300)
        await client.wait_until(lambda: len(client.tokens[running]) > 0)
        others = [client.submit([5] * 10, 2) for _ in range(3)]
        await client.finish(*others, running)
        assert sorted(client.ended[i].split(":")[0] for i in others) == ["busy", "busy", "length"]
        await assert_idle(decode)
        for closing in (client.session, decode):
            await closing.close()

    run(scenario())


def test_every_role_generates_and_prefills_for_others() -> None:
    model = tiny_model("llama")
    roles = (Role.PREFILL, Role.DECODE, Role.COLOCATED)
    # Each role gets prompts of its own for itself, and some of which the next one computes the KV.
    salted = [[[3 + salt, *prompt] for prompt in prompts()] for salt in range(2 * len(roles))]
    expected = [[oracle(model, prompt, MAX_TOKENS) for prompt in some] for some in salted]

    async def scenario() -> None:
        workers = [await start(role, model) for role in roles]
        clients = [await Client.connect(worker) for worker in workers]
        sent: list[tuple[Client, list[str]]] = []
        for i, client in enumerate(clients):  # all at once: every worker does everything together
            peer = peer_of(workers[i - 1])
            sent.append((client, [client.submit(p, MAX_TOKENS) for p in salted[2 * i]]))
            remote = [client.submit(p, MAX_TOKENS, peer) for p in salted[2 * i + 1]]
            sent.append((client, remote))
        assert [await client.finish(*ids) for client, ids in sent] == expected
        paths = [client.paths[ids[-1]] for client, ids in sent]
        assert paths == ["local", "remote"] * len(roles)
        await assert_idle(*workers)
        for closing in (*(client.session for client in clients), *workers):
            await closing.close()

    run(scenario())


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    model = tiny_model("llama")
    prompt = prompts()[-2]
    expected = oracle(model, prompt, 60)

    async def scenario() -> None:
        decode = await start(Role.DECODE, model)
        client = await Client.connect(decode)
        running = client.submit(prompt, 60)
        await client.wait_until(lambda: len(client.tokens[running]) > 2)
        draining = asyncio.create_task(decode.drain(30))
        await asyncio.sleep(0)  # lets the drain begin
        late = client.submit(prompt, 2)
        assert await client.finish(running, late) == [expected, []]
        assert client.ended[late] == "draining: this worker is being stopped"
        assert await draining
        for closing in (client.session, decode):
            await closing.close()

    run(scenario())


def test_a_drain_is_bounded() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        decode = await start(Role.DECODE, model)
        client = await Client.connect(decode)
        running = client.submit([5] * 10, 500)
        await client.wait_until(lambda: len(client.tokens[running]) > 2)
        began = asyncio.get_running_loop().time()
        assert not await decode.drain(0.1)
        assert 0.1 <= asyncio.get_running_loop().time() - began < 2.0  # a busy machine included
        assert await client.finish(running)
        assert client.ended[running].startswith("moved: ")
        assert len(client.tokens[running]) < 500
        for closing in (client.session, decode):
            await closing.close()

    run(scenario())
