"""The ladder over real workers: the next prefill worker, the decode worker itself, an honest no."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from ladder_cluster import MAX_TOKENS, PROMPT, Cluster, run
from memory_transport import Fault, FaultPlan
from pools import until
from tiny_models import oracle, tiny_model

from antiphon.messages import PrefillPeer
from antiphon.workers import peers, worker

NOWHERE = PrefillPeer("ws://127.0.0.1:9/session", "nobody")


def test_a_prefill_worker_that_dies_in_mid_transfer_is_replaced() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan({2: Fault.HOLD}), FaultPlan()) as cluster:
            request_id = cluster.submit()
            await until(lambda: cluster.decode.generate.receiver.counters().segments == 1)
            dying = cluster.prefills.pop(0)
            await dying._server.close()
            assert await cluster.client.finish(request_id) == [expected]
            assert cluster.client.paths[request_id] == "remote"
            assert cluster.attempts("lost") == 1
            cluster._plans[0].release()
            await dying.close()

    run(scenario())


def test_a_transfer_that_fails_at_its_very_end_needs_nobody_else() -> None:
    model = tiny_model("llama")
    prompt = PROMPT[:16]  # one chunk
    expected = oracle(model, prompt, MAX_TOKENS)

    async def scenario() -> None:
        held_end = FaultPlan({2: Fault.HOLD})  # sends: the handshake, the chunk, END
        async with Cluster(model, held_end, FaultPlan(), stall_seconds=0.3) as cluster:
            request_id = cluster.submit(prompt=prompt)
            assert await cluster.client.finish(request_id) == [expected]
            assert cluster.client.paths[request_id] == "remote"
            assert (cluster.attempts("stalled"), cluster.attempts("complete")) == (1, 0)
            assert cluster.computed() == [15, 0]

    run(scenario())


def test_a_slow_prefill_worker_is_given_up_also_while_the_prompt_is_queued_there() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan(), FaultPlan(), stall_seconds=0.3) as cluster:
            gate = threading.Event()
            cluster.prefills[0].engine.call(lambda _: gate.wait(20))
            request_id = cluster.submit()
            assert await cluster.client.finish(request_id) == [expected]
            assert cluster.client.paths[request_id] == "remote"
            assert (cluster.attempts("stalled"), cluster.attempts("complete")) == (1, 1)
            again = cluster.submit(prompt=[7, *PROMPT])
            await cluster.client.finish(again)
            assert cluster.attempts("complete") == 2, "the shunned one was not asked again"
            gate.set()
            await until(lambda: cluster.prefills[0].num_requests == 0)
            assert cluster.computed()[0] == 0, "it learned that nobody waits any more"

    run(scenario())


def test_all_attempts_together_are_bounded_in_time() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        plans = [FaultPlan({1: Fault.HOLD}) for _ in range(3)]
        async with Cluster(model, *plans, stall_seconds=0.4, timeout_seconds=0.6) as cluster:
            request_id = cluster.submit()
            began = asyncio.get_running_loop().time()
            assert await cluster.client.finish(request_id) == [expected]
            assert asyncio.get_running_loop().time() - began < 3
            assert cluster.client.paths[request_id] == "fallback"
            assert (cluster.attempts("stalled"), cluster.attempts("timed_out")) == (1, 1)
            assert cluster.fallbacks("timed_out") == 1
            assert cluster.computed()[2] == 0

    run(scenario())


def test_attempts_are_bounded_in_number() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        plans = [FaultPlan({1: Fault.BREAK_BEFORE}) for _ in range(3)]  # the first segment
        async with Cluster(model, *plans, max_prefill_attempts=2) as cluster:
            request_id = cluster.submit()
            await cluster.client.finish(request_id)
            assert cluster.client.paths[request_id] == "fallback"
            assert (cluster.attempts("lost"), cluster.fallbacks("lost")) == (2, 1)
            assert cluster.computed()[2] == 0

    run(scenario())


@pytest.fixture
def silent() -> Iterator[PrefillPeer]:
    """A peer that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield PrefillPeer(f"ws://127.0.0.1:{server.getsockname()[1]}/session", "silent")


def test_an_unreachable_peer_costs_its_time_out_once_and_then_is_shunned(
    monkeypatch: pytest.MonkeyPatch, silent: PrefillPeer
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(peers, "CONNECT_SECONDS", 0.5)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan()) as cluster:
            loop = asyncio.get_running_loop()
            seconds = []
            for first in (8, 9):
                began = loop.time()
                request_id = cluster.submit(silent, *cluster.candidates, prompt=[first] * 40)
                await cluster.client.finish(request_id)
                seconds.append(loop.time() - began)
                assert cluster.client.paths[request_id] == "remote"
            assert cluster.attempts("unreachable") == 1
            assert 0.5 <= seconds[0] < 1.5
            assert seconds[1] < 0.5

    run(scenario())


def test_a_shunned_worker_is_asked_when_nobody_else_is_left() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan(), max_fallback_tokens=70) as cluster:
            (peer,) = cluster.candidates
            cluster.decode.generate._ladder._shunned.failed(peer.incarnation)
            alone = cluster.submit(prompt=[9] * 40)
            await cluster.client.finish(alone)
            assert cluster.client.paths[alone] == "fallback"
            assert cluster.fallbacks("shunned") == 1
            cluster.decode.generate._ladder._shunned.leaving(peer.incarnation)
            gate = threading.Event()
            cluster.decode.engine.call(lambda _: gate.wait(20))
            queued = cluster.client.submit([8] * 400, 1)
            request_id = cluster.submit()
            await until(lambda: cluster.decode.num_requests == 2)
            gate.set()
            assert await cluster.client.finish(request_id, queued)
            assert cluster.client.tokens[request_id] == expected
            assert cluster.client.paths[request_id] == "remote"
            assert not cluster.decode.generate._ladder._shunned.is_shunned(peer.incarnation)

    run(scenario())


def test_a_draining_prefill_worker_hands_over_what_it_cannot_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And does not wait for ever for a transfer that does not let go of its blocks."""
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)
    monkeypatch.setattr(worker, "_HAND_OVER_SECONDS", 0.2)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan({2: Fault.HOLD}), FaultPlan()) as cluster:
            request_id = cluster.submit()
            await until(lambda: cluster.decode.generate.receiver.counters().segments == 1)
            draining = asyncio.create_task(cluster.prefills[0].drain(0.2))
            late = cluster.submit(prompt=[5, *PROMPT])
            await cluster.client.finish(request_id, late)
            assert cluster.client.tokens[request_id] == expected
            assert set(cluster.client.paths.values()) == {"remote"}
            assert cluster.attempts("draining") == 2
            assert not await asyncio.wait_for(draining, 3)
            assert cluster.prefills[0].num_requests == 1

    run(scenario())


@pytest.mark.parametrize("plan", [FaultPlan({2: Fault.HOLD}), None], ids=["holding", "connecting"])
def test_an_abort_on_any_rung_frees_everything(plan: FaultPlan | None) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, plan or FaultPlan(), stall_seconds=0.05) as cluster:
            for delay in range(8):
                target = cluster.candidates if plan else [NOWHERE, *cluster.candidates]
                request_id = cluster.submit(*target, prompt=[5 + delay, *PROMPT])
                await asyncio.sleep(delay * 0.01)
                cluster.client.abort(request_id)
            await until(lambda: cluster.decode.num_requests == 0)

    run(scenario())
