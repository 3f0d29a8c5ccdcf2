"""The seventh of the nine failures: too much at once for a decode worker."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from crew import watch
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import oracle, tiny_model
from two_pools import SLOW_STEP_SECONDS, close

from antiphon.config import EngineConfig, HandoffConfig
from antiphon.messages import Role

PROMPT = [5 + i for i in range(45)]  # three blocks of 16
LATE_PROMPT = [120 - i for i in range(45)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_a_full_decode_worker_says_so_at_once_and_holds_up_no_prefill() -> None:
    """Decode under memory pressure stalled prefill for minutes (sglang#6351)."""
    model = tiny_model("llama")
    long = [5 + i % 100 for i in range(200)]
    waiting = [[60 - number + i % 50 for i in range(100)] for number in range(2)]
    expected = [oracle(model, long, 50), *(oracle(model, prompt, 4) for prompt in waiting)]
    neighbours = oracle(model, PROMPT, 4)

    async def scenario() -> None:
        network = MemoryNetwork()
        prefill = await start(Role.PREFILL, model, transport=MemoryTransport(network, "p"))
        engine = EngineConfig(max_waiting_requests=2, prefix_cache=False)
        here = MemoryTransport(network, "d")
        full = await start(Role.DECODE, model, engine=engine, num_blocks=16, transport=here)
        other = await start(Role.DECODE, model, transport=MemoryTransport(network, "e"))
        client, neighbour = await Client.connect(full), await Client.connect(other)
        watch(full, lambda batch: time.sleep(SLOW_STEP_SECONDS))
        running = client.submit(long, 50, peer_of(prefill))  # 13 of 16 blocks at first
        await client.wait_until(lambda: len(client.tokens[running]) > 0)
        queued = [client.submit(prompt, 4, peer_of(prefill)) for prompt in waiting]  # 7 each
        refused = client.submit(LATE_PROMPT, 4, peer_of(prefill))
        began = time.monotonic()
        await client.finish(refused)
        assert client.ended[refused].startswith("busy: ")
        assert time.monotonic() - began < 0.5  # a step takes 0.02 here
        assert prefill.num_requests == 0, "nobody has room for what it would compute"
        passing = neighbour.submit(PROMPT, 4, peer_of(prefill))
        assert await neighbour.finish(passing) == [neighbours]
        assert running not in client.ended
        assert await client.finish(running, *queued) == expected
        await assert_idle(prefill, full, other)
        await close(client.session, neighbour.session, prefill, full, other)

    run(scenario())


def test_a_burst_on_a_fresh_worker_reserves_no_more_than_it_may() -> None:
    """A decode instance that had just started preallocated for all that came (sglang#22877)."""
    model = tiny_model("llama")
    max_pending, max_waiting, num_sent = 3, 4, 20
    prompts = [[5 + (n + i) % 100 for i in range(45)] for n in range(num_sent)]
    expected = [oracle(model, prompt, 4) for prompt in prompts]

    async def scenario() -> None:
        network, plan = MemoryNetwork(), FaultPlan({1: Fault.HOLD})  # nothing arrives at first
        prefill = await start(Role.PREFILL, model, transport=MemoryTransport(network, "p", plan))
        fresh = await start(
            Role.DECODE,
            model,
            engine=EngineConfig(max_waiting_requests=max_waiting),
            handoff=HandoffConfig(max_pending=max_pending),
            transport=MemoryTransport(network, "d"),
        )
        client = await Client.connect(fresh)
        began = time.monotonic()
        sent = [client.submit(prompt, 4, peer_of(prefill)) for prompt in prompts]
        receiver = fresh.generate.receiver
        await until(lambda: receiver.num_pending == max_pending)
        # Those that came while the first ones still waited themselves found three places less.
        least_refused = num_sent - max_pending - max_waiting
        await client.wait_until(lambda: len(client.ended) >= least_refused)
        await until(lambda: len(client.ended) + fresh.num_requests == num_sent)
        assert time.monotonic() - began < 5.0  # prefill is held for as long as this test likes
        assert {reason.partition(":")[0] for reason in client.ended.values()} == {"busy"}
        # Three blocks for each prompt that is awaited, and none for those that wait.
        num_free = fresh.card.num_blocks - 3 * max_pending
        await until(lambda: fresh.engine.last_load.num_free_blocks == num_free)
        await until(lambda: prefill.num_requests == max_pending)
        assert receiver.num_pending == max_pending
        plan.release()
        await client.finish(*sent)
        for request_id, tokens in zip(sent, expected, strict=True):
            is_busy = client.ended[request_id].startswith("busy")
            assert client.tokens[request_id] == ([] if is_busy else tokens)
        await assert_idle(prefill, fresh)
        await close(client.session, prefill, fresh)

    run(scenario())
