"""Prompts that begin alike and arrive together: what they share is computed once."""

import asyncio
from collections import Counter

import pytest
from memory_transport import MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start
from scheduling import make, prefill, request, step
from tiny_models import oracle, tiny_model

from antiphon.config import EngineConfig
from antiphon.messages import Role
from antiphon.workers.request import PrefillPath, Request, RequestStatus
from antiphon.workers.scheduler import Scheduler


def run(scheduler: Scheduler) -> Counter[str]:
    """Steps until there is nothing to compute; tokens by request."""
    computed: Counter[str] = Counter()
    while chunks := step(scheduler):
        scheduler.check()
        for request_id, num_tokens in chunks:
            computed[request_id] += num_tokens
    return computed


@pytest.mark.parametrize("max_batch_tokens", [7, 8, 80])
def test_equal_prompts_are_computed_once_and_share_their_blocks(max_batch_tokens: int) -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=max_batch_tokens)
    sent = [prefill(name, 32) for name in "pqr"]
    for one in sent:
        scheduler.add(one)
    assert run(scheduler) == {"p": 32}
    assert {one.status for one in sent} == {RequestStatus.SENDING}
    assert sent[0].block_table == sent[1].block_table == sent[2].block_table
    assert scheduler.pool.num_free == 64 - 8
    assert [one.num_cached_tokens for one in sent] == [0, 32, 32]
    assert scheduler.num_cached_tokens == 64


def test_choices_of_one_prompt_compute_their_last_tokens_only() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=8)
    choices = [request(name, 32, max_tokens=1) for name in ("a", "a2", "a3")]
    for one in choices:
        scheduler.add(one)
    assert run(scheduler) == {"a": 32, "a2": 4, "a3": 4}  # the last one is needed for its logits
    assert [one.num_cached_tokens for one in choices] == [0, 28, 28]
    assert all(one.output_token_ids == [9] for one in choices)


def test_a_prompt_that_is_found_but_for_one_token_is_done_when_it_is_found() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=64)
    first, second = request("a", 33), request("a2", 33)
    for one in (first, second):
        scheduler.add(one)
    assert step(scheduler) == [("a", 33)]
    batch = scheduler.schedule(now=5.0)
    assert batch is not None
    assert [(c.request.request_id, c.num_tokens, c.samples) for c in batch.chunks] == [
        ("a", 1, True),
        ("a2", 1, True),
    ]
    timeline = second.timeline
    assert (timeline.prefill_began_at, timeline.prompt_done_at) == (0.0, 5.0)


def test_what_waiting_prompts_share_counts_once_in_the_queue() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=8, max_num_requests=2)
    for one in [*(prefill(name, 32) for name in "pqrs"), request("b", 12)]:
        scheduler.add(one)
    assert scheduler.num_queued_tokens == 32 + 12
    step(scheduler)
    assert scheduler.num_queued_tokens == 24 + 12


def test_who_waits_for_a_block_leaves_the_budget_to_others() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=20)
    for one in (prefill("p", 12), prefill("q", 16), request("b", 6, max_tokens=1)):
        scheduler.add(one)
    assert step(scheduler) == [("p", 12), ("b", 6)]
    assert step(scheduler) == [("q", 4)]


def test_who_waits_sends_what_the_other_one_computes() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=8)
    for name in "pq":
        scheduler.add(prefill(name, 32))
    progress = []
    while step(scheduler):
        progress += [(r.request_id, r.num_computed_tokens) for r in scheduler.take_progressed()]
    assert progress == [
        ("p", 8), ("q", 8), ("p", 16), ("q", 16), ("p", 24), ("q", 24), ("p", 32),
    ]  # fmt: skip
    assert [r.request_id for r in scheduler.take_progressed()] == ["q"]


def test_who_waits_goes_on_alone_when_the_other_one_is_aborted() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=8)
    for name in "pq":
        scheduler.add(prefill(name, 32))
    assert step(scheduler) == [("p", 8)]
    scheduler.abort("p", keep_blocks=True)
    assert run(scheduler) == {"q": 24}
    for name in "pq":
        scheduler.abort(name)
    assert scheduler.pool.num_free == 64


def test_who_waits_goes_on_alone_when_the_other_one_is_preempted() -> None:
    scheduler = make(num_blocks=13, block_size=4, max_batch_tokens=3)
    streams = [request(name, 4, max_tokens=30) for name in "bd"]
    older, younger = request("a", 16), prefill("p", 16)
    younger.prompt_token_ids[:] = older.prompt_token_ids
    for one in (*streams, older, younger):
        scheduler.add(one)
    while not older.num_preemptions:
        assert step(scheduler)
        scheduler.check()
    assert younger.num_computed_tokens < 16
    while younger.status is RequestStatus.RUNNING:
        assert any(request_id == "p" for request_id, _ in step(scheduler))


def test_without_a_prefix_cache_nobody_waits() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=64, prefix_cache=False)
    for name in "pq":
        scheduler.add(prefill(name, 32))
    assert step(scheduler) == [("p", 32), ("q", 32)]


def test_blocks_with_kv_stay_where_they_are() -> None:
    """A transfer may have brought them, or be reading them; others begin at the next block."""
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=64)
    remote = request("a", 21, path=PrefillPath.REMOTE)
    scheduler.add(remote)
    scheduler.add(request("a2", 21, max_tokens=20))
    assert step(scheduler) == [("a2", 21)]
    own = list(remote.block_table)
    scheduler.kv_arrived("a", 6, PrefillPath.FALLBACK, now=1.0)
    assert step(scheduler) == [("a2", 1), ("a", 15)]  # in the middle of a block
    assert remote.block_table[:6] == own


def test_what_arrived_up_to_a_block_s_end_is_gone_on_from_there() -> None:
    scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=64)
    remote, local = request("a", 21, path=PrefillPath.REMOTE), request("a2", 21, max_tokens=20)
    for one in (remote, local):
        scheduler.add(one)
    assert step(scheduler) == [("a2", 21)]
    own = list(remote.block_table)
    scheduler.kv_arrived("a", 8, PrefillPath.FALLBACK, now=1.0)
    assert step(scheduler) == [("a2", 1), ("a", 1)]
    assert remote.block_table[:2] == own[:2]
    assert remote.block_table[2:5] == local.block_table[2:5]
    assert remote.num_cached_tokens == 12
    scheduler.check()


def test_tokens_that_several_prompts_lack_are_queued_once() -> None:
    def queued(*prompts: Request, prefix_cache: bool = True) -> int:
        scheduler = make(num_blocks=64, block_size=4, max_batch_tokens=8, prefix_cache=prefix_cache)
        for one in prompts:
            scheduler.add(one)
        for _ in range(2):
            batch = scheduler.schedule()
            assert batch is not None
            num_queued = scheduler.num_queued_tokens
            scheduler.complete(batch, [], now=0.0)
        return num_queued

    assert queued(prefill("p", 32)) == 24
    assert queued(prefill("p", 32), prefill("q", 32)) == 24
    assert queued(prefill("p", 32), prefill("q", 42), request("a", 9)) == 24 + 10 + 9
    assert queued(prefill("p", 32), prefill("q", 32), prefix_cache=False) == 24 + 32


def test_two_pools_answer_as_one_to_equal_prompts_that_come_together() -> None:
    model, network = tiny_model("llama"), MemoryNetwork()
    prompt = [5 + i for i in range(45)]
    expected = oracle(model, prompt, 8)

    async def scenario() -> None:
        engine = EngineConfig(max_batch_tokens=16)
        there, here = MemoryTransport(network, "p"), MemoryTransport(network, "d")
        prefill_worker = await start(Role.PREFILL, model, engine=engine, transport=there)
        decode_worker = await start(Role.DECODE, model, transport=here)
        client = await Client.connect(decode_worker)
        ids = [client.submit(prompt, 8, peer_of(prefill_worker)) for _ in range(4)]
        assert await client.finish(*ids) == [expected] * 4
        assert {client.paths[one] for one in ids} == {"remote"}
        # Of 44 tokens, those behind the last whole block of 16 are everybody's own.
        assert prefill_worker.engine.stats.num_prompt_tokens == 44 + 3 * (44 - 32)
        await assert_idle(prefill_worker, decode_worker)
        for closing in (client.session, prefill_worker, decode_worker):
            await closing.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
