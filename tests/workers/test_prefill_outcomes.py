"""How an attempt at a prefill worker ended: the label it is counted under, the line it leaves."""

import logging
import threading

import pytest
from ladder_cluster import MAX_TOKENS, PROMPT, Cluster, run
from memory_transport import Fault, FaultPlan, MemoryTransport
from pools import assert_idle, peer_of, start, until
from tiny_models import oracle, tiny_model

from antiphon.config import EngineConfig
from antiphon.messages import Role
from antiphon.workers.handoff.sender_link import SenderLimits


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.CORRUPT_PAYLOAD, "rejected"),
        (Fault.BREAK_BEFORE, "lost"),
        (Fault.DROP, "rejected"),
        (Fault.HOLD, "stalled"),
    ],
)
def test_another_prefill_worker_goes_on_from_the_tokens_that_arrived(
    fault: Fault, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)
    patience = 1.0 if fault is Fault.HOLD else 20.0  # enough for the other one on a busy machine
    plans = FaultPlan({2: fault}), FaultPlan()

    async def scenario() -> None:
        async with Cluster(model, *plans, stall_seconds=patience) as cluster:
            request_id = cluster.submit()
            assert await cluster.client.finish(request_id) == [expected]
            assert cluster.client.paths[request_id] == "remote"
            assert (cluster.attempts(outcome), cluster.attempts("complete")) == (1, 1)
            assert cluster.decode.engine.stats.num_prompt_tokens == 0
            counters = cluster.decode.generate.receiver.counters()
            per_token = cluster.decode.card.wire_bytes_per_token
            assert counters.received_bytes == 59 * per_token, "16 tokens were sent twice"
            (line,) = [each for each in warnings(caplog) if f"{request_id}: prefill att" in each]
            first = cluster.prefills[0].card.replica_id
            assert f"prefill attempt 1, at {first}, transfer " in line
            assert f", {outcome}: " in line
            # More chunks arrived, if the link was slower than the engine and they went as one.
            missing = (43, 27, 11)
            assert line.endswith(tuple(f"; {n} of 59 tokens are still missing" for n in missing))

    run(scenario())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_full_prefill_worker_says_busy_and_the_next_one_is_asked() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan(), FaultPlan()) as cluster:
            full = await start(
                Role.PREFILL,
                model,
                engine=EngineConfig(max_waiting_requests=1),
                transport=MemoryTransport(cluster.network, "full"),
            )
            gate = threading.Event()
            full.engine.call(lambda _: gate.wait(20))
            asker = cluster.submit(peer_of(full), prompt=[5, *PROMPT])
            await until(lambda: full.num_requests == 1)
            request_id = cluster.submit(peer_of(full), *cluster.candidates)
            assert await cluster.client.finish(request_id) == [expected]
            assert (cluster.attempts("busy"), cluster.attempts("complete")) == (1, 1)
            refusals = "antiphon_worker_refusals_total"
            assert full.metrics.count(refusals, reason="queue_full") == 1
            cluster.client.abort(asker)
            gate.set()
            await assert_idle(full)
            await full.close()

    run(scenario())


def test_a_prefill_worker_without_a_link_to_spare_says_busy_and_counts_that() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        async with Cluster(model, FaultPlan()) as cluster:
            (worker,) = cluster.prefills
            worker.prefill._sender._limits = SenderLimits(max_links=0)
            request_id = cluster.submit()
            await cluster.client.finish(request_id)
            assert (cluster.attempts("busy"), cluster.fallbacks("busy")) == (1, 1)
            assert worker.metrics.count("antiphon_worker_refusals_total", reason="no_link") == 1

    run(scenario())


def test_a_prompt_that_one_prefill_worker_cannot_take_goes_to_the_next() -> None:
    model = tiny_model("llama")
    expected = oracle(model, PROMPT, MAX_TOKENS)

    async def scenario() -> None:
        async with Cluster(model, FaultPlan()) as cluster:
            here = MemoryTransport(cluster.network, "small")
            small = await start(Role.PREFILL, model, num_blocks=2, transport=here)
            request_id = cluster.submit(peer_of(small), *cluster.candidates)
            assert await cluster.client.finish(request_id) == [expected]
            assert cluster.client.paths[request_id] == "remote"
            assert (cluster.attempts("refused"), cluster.attempts("complete")) == (1, 1)
            fits = cluster.submit(peer_of(small), prompt=[7] * 20)
            await cluster.client.finish(fits)
            assert cluster.client.paths[fits] == "remote", "that says nothing against it"
            await assert_idle(small)
            await small.close()

    run(scenario())


def test_without_a_free_link_of_its_own_the_decode_worker_computes() -> None:
    model = tiny_model("llama")
    prompts = [PROMPT, [7, *PROMPT]]
    expected = [oracle(model, prompt, MAX_TOKENS) for prompt in prompts]

    async def scenario() -> None:
        held, plan = FaultPlan({1: Fault.HOLD}), FaultPlan()
        async with Cluster(model, held, plan, max_links=1) as cluster:
            first, second = cluster.candidates
            waiting = cluster.submit(first, prompt=prompts[0])
            await until(lambda: cluster.decode.generate.receiver.num_pending == 1)
            request_id = cluster.submit(second, prompt=prompts[1])
            assert await cluster.client.finish(request_id) == [expected[1]]
            assert cluster.client.paths[request_id] == "fallback"
            assert (cluster.attempts("no_link"), cluster.fallbacks("no_link")) == (1, 1)
            held.release()
            assert await cluster.client.finish(waiting) == [expected[0]]
            again = cluster.submit(second, prompt=[8, *PROMPT])
            await cluster.client.finish(again)
            assert cluster.client.paths[again] == "remote", "that said nothing against it"

    run(scenario())
