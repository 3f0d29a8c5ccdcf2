"""What a client that got no place is told of when to come again."""

import pytest
from msgspec.structs import replace

from antiphon.errors import NoWorkerError, ServiceStoppingError, WorkerBusyError
from antiphon.messages import Role
from antiphon.router.retry_after import RetryAfter, Turnover, whole_seconds

BUSY = WorkerBusyError("full")
NOBODY = NoWorkerError("no decode worker")


def told(retry_after, view, error=BUSY, listed=None, num_tokens=100, now=0.0):
    return retry_after.seconds(
        error, view, view.cards if listed is None else listed, num_tokens, now
    )


@pytest.fixture
def view(cluster):
    """Two prefill and two decode workers; the load of each is the test's to choose."""
    return cluster.view(prefill=2, decode=2)


def load_of(cluster, view, **loads):
    """Give each worker, by name, a load that differs from an idle one."""
    for name, fields in loads.items():
        view.get(name).load = replace(cluster.idle, **fields)


def test_the_header_is_a_whole_number_between_its_bounds():
    told = [whole_seconds(seconds) for seconds in (-3.0, 0.0, 0.2, 1.0, 1.1, 59.5, 60.0, 1e9)]
    assert told == [1, 1, 1, 1, 2, 60, 60, 60]


def test_a_queue_is_its_tokens_over_the_measured_rate_of_the_earliest_prefill_worker(cluster, view):
    load_of(
        cluster,
        view,
        p0={"num_queued_tokens": 30_000, "prefill_tokens_per_second": 1000.0},
        p1={"num_queued_tokens": 60_000, "prefill_tokens_per_second": 5000.0},
    )
    assert told(RetryAfter(0.0), view) == pytest.approx(12.0)


def test_requests_that_wait_for_decode_wait_for_streams_to_end(cluster, view):
    waiting = {"num_waiting": 99, "decode_step_seconds": 0.1}
    load_of(cluster, view, d0=waiting, d1={**waiting, "num_waiting": 199})
    assert told(RetryAfter(0.0), view) == pytest.approx(5.0 + 10.0)
    load_of(cluster, view, d1={})
    assert told(RetryAfter(0.0), view) < 1.0


def test_the_longer_of_the_two_queues_counts_because_both_shrink(cluster, view):
    queued, full = {"num_queued_tokens": 8000}, {"num_free_blocks": 4}
    load_of(cluster, view, p0=queued, p1=queued, d0=full, d1=full)
    assert told(RetryAfter(0.0), view) == pytest.approx(8.0)


def test_a_worker_without_blocks_for_the_prompt_has_to_free_some_first(cluster, view):
    full = {"num_free_blocks": 4}
    load_of(cluster, view, d0=full, d1=full)
    assert told(RetryAfter(0.0), view, num_tokens=60) < 1.0
    assert told(RetryAfter(0.0), view, num_tokens=64) > 4.0


@pytest.mark.parametrize("pools", [{"colocated": 1}, {"decode": 1}])
def test_who_computes_prompts_itself_waits_for_its_own_queue(cluster, pools):
    view = cluster.view(**pools)
    load_of(cluster, view, **{view.decode_workers[0].card.incarnation: {"num_queued_tokens": 7000}})
    assert told(RetryAfter(0.0), view) == pytest.approx(7.0)


def test_a_lost_pool_is_expected_back_after_as_long_as_its_worker_took_to_start(cluster):
    view = cluster.view(prefill=1)
    retry_after = RetryAfter(0.0)
    retry_after.learn(replace(cluster.card("d", Role.DECODE), start_seconds=25.0))
    retry_after.learn(replace(cluster.card("p", Role.PREFILL), start_seconds=500.0))
    retry_after.observe(cluster.view(decode=1), {"d0": cluster.card("d0", Role.DECODE)}, now=50.0)
    retry_after.observe(view, {}, now=100.0)
    assert told(retry_after, view, NOBODY, now=100.0) == pytest.approx(35.0)
    assert told(retry_after, view, NOBODY, now=130.0) == pytest.approx(5.0)
    # Longer than expected: as long again.
    assert told(retry_after, view, NOBODY, now=155.0) == pytest.approx(20.0)


def test_a_worker_that_is_listed_but_out_of_reach_is_back_or_found_dead_at_a_health_check(cluster):
    listed = {"d0": cluster.card("d0", Role.DECODE)}
    retry_after = RetryAfter(0.0)
    view = cluster.view(prefill=1)
    assert told(retry_after, view, NOBODY, listed, now=1.0) == pytest.approx(4.0)


def test_a_pool_that_drains_is_a_lost_one(cluster):
    view = cluster.view(decode=1)
    retry_after = RetryAfter(0.0)
    retry_after.observe(view, view.cards, now=1.0)
    view.apply("d0", cluster.delta(1, replace(cluster.idle, is_draining=True)), now=10.0)
    retry_after.observe(view, view.cards, now=10.0)
    assert told(retry_after, view, NOBODY, now=10.0) == pytest.approx(30.0)


def test_a_worker_that_serve_lists_no_more_is_not_waited_for(cluster):
    view = cluster.view(decode=1)
    assert told(RetryAfter(0.0), view, NOBODY, listed={}, now=0.0) == pytest.approx(30.0)


def test_an_endpoint_that_stops_is_gone_when_it_says(cluster, view):
    retry_after = RetryAfter(0.0)
    retry_after.stops_at = 100.0
    assert told(retry_after, view, ServiceStoppingError("stops"), now=58.0) == pytest.approx(42.0)


def test_slots_free_themselves_at_the_pace_of_late():
    turnover = Turnover()
    assert turnover.seconds(4, num_held=8) == 0.0
    turnover.ended(20.0)
    assert turnover.seconds(4, num_held=8) == pytest.approx(10.0)
    turnover.ended(10.0)
    assert turnover.seconds(4, num_held=8) == pytest.approx(9.0)
