import pytest
from scheduling import make, prefill, request, step

from antiphon.workers.block_pool import BlockPool
from antiphon.workers.request import PrefillPath, RequestStatus
from antiphon.workers.scheduler import Scheduler, SchedulerConfig


def test_decode_steps_come_first_and_prompts_share_the_rest() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 3))
    assert step(scheduler) == [("a", 3)]
    scheduler.add(request("b", 5))
    scheduler.add(request("c", 9))
    assert step(scheduler) == [("a", 1), ("b", 5), ("c", 2)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 6)]


def test_a_prompt_crawls_when_decodes_fill_the_budget() -> None:
    scheduler = make(max_batch_tokens=2)
    for name in "ab":
        scheduler.add(request(name, 1, max_tokens=20))
    step(scheduler)
    scheduler.add(request("c", 3))
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]


def test_prompts_beside_decode_steps_stay_within_their_limit() -> None:
    limits: list[int] = []

    def limit(num_decoding: int) -> int | None:
        limits.append(num_decoding)
        return 30 if num_decoding else None

    scheduler = Scheduler(SchedulerConfig(max_batch_tokens=80), BlockPool(16, 16), limit)
    scheduler.add(request("a", 60))
    assert step(scheduler) == [("a", 60)]  # nobody waits for a token
    scheduler.add(request("b", 50))
    scheduler.add(request("c", 40))
    assert step(scheduler) == [("a", 1), ("b", 30)]
    assert step(scheduler) == [("a", 1), ("b", 20), ("c", 10)]
    assert limits == [0, 1, 1]


@pytest.mark.parametrize(
    ("max_batch_tokens", "num_prompt_tokens", "pieces"),
    [(80, 46, [46]), (80, 47, [30, 17]), (40, 39, [39]), (40, 40, [30, 10])],
    ids=["a rest of 16", "of 17", "as many as the step holds", "one more"],
)
def test_a_small_rest_of_a_prompt_goes_along(max_batch_tokens, num_prompt_tokens, pieces) -> None:
    config = SchedulerConfig(max_batch_tokens=max_batch_tokens)
    scheduler = Scheduler(config, BlockPool(16, 16), lambda n: 30 if n else None)
    scheduler.add(request("a", 2))
    step(scheduler)
    scheduler.add(request("b", num_prompt_tokens))
    assert [step(scheduler) for _ in pieces] == [[("a", 1), ("b", size)] for size in pieces]


def test_remote_request_reserves_all_its_blocks_then_waits_for_kv() -> None:
    scheduler = make()
    remote = request("r", 10, path=PrefillPath.REMOTE)
    scheduler.add(remote)
    assert step(scheduler) == []
    assert scheduler.take_reserved() == [remote]
    assert remote.status is RequestStatus.AWAITING_KV
    assert len(remote.block_table) == 3
    scheduler.kv_arrived("r", 9, PrefillPath.REMOTE, now=1.0)
    assert step(scheduler) == [("r", 1)]
    assert remote.path is PrefillPath.REMOTE
    assert remote.timeline.prompt_done_at == 1.0


def test_remote_request_with_partial_kv_computes_the_rest() -> None:
    scheduler = make()
    scheduler.add(request("r", 10, path=PrefillPath.REMOTE))
    step(scheduler)
    scheduler.kv_arrived("r", 4, PrefillPath.FALLBACK, now=1.0)
    assert step(scheduler) == [("r", 6)]


def test_remote_request_whose_prompt_is_cached_asks_nobody() -> None:
    scheduler = make()
    scheduler.add(request("a", 9, max_tokens=1))
    step(scheduler)
    again = request("a2", 9, path=PrefillPath.REMOTE)
    scheduler.add(again)
    assert step(scheduler) == [("a2", 1)]
    assert scheduler.take_reserved() == []
    assert again.num_cached_tokens == 8


def test_awaiting_requests_are_bounded() -> None:
    scheduler = make(max_awaiting_kv=1)
    for name in "rs":
        scheduler.add(request(name, 5, path=PrefillPath.REMOTE))
    step(scheduler)
    assert scheduler.queues.num_awaiting_kv == 1
    assert scheduler.queues.num_waiting == 1


def test_requests_that_need_no_prefill_worker_do_not_wait_for_one() -> None:
    scheduler = make(max_awaiting_kv=1)
    for name in "rs":
        scheduler.add(request(name, 5, path=PrefillPath.REMOTE))
    scheduler.add(request("a", 5))
    assert step(scheduler) == [("a", 5)]
    scheduler.kv_arrived("r", 4, PrefillPath.REMOTE, now=1.0)
    assert step(scheduler) == [("a", 1), ("r", 1)]
    assert scheduler.queues.num_awaiting_kv == 1
    assert scheduler.queues.num_waiting == 0


def test_requests_with_kv_on_its_way_count_as_running() -> None:
    scheduler = make(max_num_requests=2)
    for name in "rst":
        scheduler.add(request(name, 5, path=PrefillPath.REMOTE))
    step(scheduler)
    assert scheduler.queues.num_awaiting_kv == 2
    for name in "rs":
        scheduler.kv_arrived(name, 4, PrefillPath.REMOTE, now=1.0)
    step(scheduler)
    assert scheduler.queues.num_running == 2
    assert scheduler.queues.num_waiting == 1


def test_prefill_only_keeps_its_blocks_until_they_were_sent() -> None:
    scheduler = make()
    sent = prefill("p", 8)
    scheduler.add(sent)
    assert step(scheduler) == [("p", 8)]
    assert scheduler.take_progressed() == [sent]
    assert sent.status is RequestStatus.SENDING
    assert scheduler.pool.num_free == 14
    scheduler.abort("p")
    assert scheduler.pool.num_free == 16
    cached = prefill("q", 8)  # all of it is cached now: there is nothing to compute
    scheduler.add(cached)
    assert step(scheduler) == []
    assert scheduler.take_progressed() == [cached]


def test_abort_with_a_reader_keeps_the_blocks() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.add(prefill("p", 8))
    step(scheduler)
    scheduler.abort("p", keep_blocks=True)
    assert scheduler.pool.num_free == 14
    assert step(scheduler) == []
    scheduler.abort("p")
    assert scheduler.pool.num_free == 16
    scheduler.check()
