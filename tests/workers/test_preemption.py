"""Who gives up blocks when output cannot grow: the youngest that can, and never an older one."""

from scheduling import make, prefill, request, step

from antiphon.workers.request import PrefillPath, RequestStatus

REMOTE = PrefillPath.REMOTE


def test_requests_with_kv_on_its_way_leave_each_other_room_to_begin() -> None:
    scheduler = make(num_blocks=8, block_size=4)
    first, second = (request(name, 16, path=REMOTE) for name in "ab")
    for one in (first, second):
        scheduler.add(one)
    for one in (first, second):
        assert step(scheduler) == []
        assert scheduler.take_reserved() == [one]
        scheduler.kv_arrived(one.request_id, 15, REMOTE, now=0.0)
        while one.status is RequestStatus.RUNNING:
            assert step(scheduler) == [(one.request_id, 1)]
            scheduler.check()
    assert scheduler.num_preemptions == 0


def test_an_older_stream_waits_for_a_younger_one_s_kv_and_then_goes_before_it() -> None:
    scheduler = make(num_blocks=8, block_size=4)
    stream, younger = request("r", 4, max_tokens=20), request("c", 20, path=REMOTE)
    scheduler.add(stream)
    step(scheduler)
    scheduler.add(younger)
    while stream.num_tokens < 13:
        assert step(scheduler) == [("r", 1)]
    assert step(scheduler) == []
    assert (younger.status, len(stream.block_table)) == (RequestStatus.AWAITING_KV, 3)
    scheduler.kv_arrived("c", 19, REMOTE, now=0.0)
    assert step(scheduler) == [("r", 1)]
    while stream.status is RequestStatus.RUNNING:
        assert ("r", 1) in step(scheduler)
        scheduler.check()
    assert (stream.num_preemptions, younger.num_preemptions) == (0, 1)
    while scheduler.queues:
        assert step(scheduler)
    assert len(younger.output_token_ids) == 4


def test_an_older_stream_waits_for_a_younger_hand_off_to_be_sent() -> None:
    scheduler = make(num_blocks=8, block_size=4)
    stream, younger = request("r", 4, max_tokens=20), prefill("p", 20)
    scheduler.add(stream)
    step(scheduler)
    scheduler.add(younger)
    while stream.num_tokens < 13:
        assert ("r", 1) in step(scheduler)
    assert step(scheduler) == []
    assert younger.status is RequestStatus.SENDING
    scheduler.abort("p")
    assert step(scheduler) == [("r", 1)]
    assert stream.num_preemptions == 0


def test_a_younger_stream_gives_way_to_kv_that_is_on_its_way_for_an_older_one() -> None:
    scheduler = make(num_blocks=8, block_size=4)
    older, stream = request("c", 20, path=REMOTE), request("r", 4, max_tokens=20)
    for one in (older, stream):
        scheduler.add(one)
    while not stream.num_preemptions:
        assert step(scheduler) or stream.num_preemptions
        scheduler.check()
    scheduler.kv_arrived("c", 19, REMOTE, now=0.0)
    while older.status is RequestStatus.RUNNING:
        assert ("c", 1) in step(scheduler)
    assert (older.num_preemptions, older.path) == (0, REMOTE)


def test_who_came_first_is_older_though_its_kv_came_later() -> None:
    scheduler = make(num_blocks=6, block_size=4)
    older, younger = (request(name, 8, max_tokens=8, path=REMOTE) for name in "ab")
    for one in (older, younger):
        scheduler.add(one)
    assert step(scheduler) == []
    for one in (younger, older):
        scheduler.kv_arrived(one.request_id, 7, REMOTE, now=0.0)
    while older.status is RequestStatus.RUNNING:
        assert ("a", 1) in step(scheduler)
        scheduler.check()
    assert (older.num_preemptions, younger.num_preemptions) == (0, 1)


def test_the_youngest_gives_up_its_blocks_and_finishes_later() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    old, young = request("a", 3, max_tokens=4), request("b", 2, max_tokens=4)
    for one in (old, young):
        scheduler.add(one)
    while scheduler.queues:
        assert step(scheduler)
        scheduler.check()
    assert scheduler.num_preemptions > 0
    assert old.num_preemptions == 0
    assert young.output_token_ids == [9] * 4
