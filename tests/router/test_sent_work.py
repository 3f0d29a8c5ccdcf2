import random

import pytest

from antiphon.router.sent_work import SentItem, SentWork

LAG = 0.05


def test_an_item_is_unseen_until_a_report_can_include_it():
    work = SentWork(LAG)
    work.add("w", 1, SentItem(sent_at=1.0, num_prefill_tokens=100, num_blocks=7))
    work.add("w", 2, SentItem(sent_at=2.0, num_prefill_tokens=10, num_blocks=1))
    ledger = work.of("w")
    assert ledger is not None
    ledger.settle(updated_at=1.0, num_requests=0)
    assert (ledger.num_unseen, ledger.num_unseen_prefill_tokens) == (2, 110)
    ledger.settle(updated_at=1.0 + LAG, num_requests=0)
    assert (ledger.num_unseen, ledger.num_unseen_prefill_tokens) == (1, 10)
    assert ledger.num_unseen_blocks == 1
    assert ledger.num_outstanding == 2


def test_streams_that_a_report_does_not_count_stay_unseen():
    work = SentWork(LAG)
    for decision_id in (1, 2, 3):
        item = SentItem(0.001 * decision_id, 100 * decision_id, 7, is_stream=True)
        work.add("w", decision_id, item)
    ledger = work.of("w")
    assert ledger is not None
    # The first one woke the worker; its report came when all had been sent for long enough.
    ledger.settle(updated_at=0.056, num_requests=1)
    assert (ledger.num_unseen_streams, ledger.num_unseen_prefill_tokens) == (2, 500)
    work.remove("w", 1)
    ledger.settle(updated_at=0.056, num_requests=1)
    assert ledger.num_unseen_prefill_tokens == 300
    ledger.settle(updated_at=0.6, num_requests=9)  # others' too
    assert ledger.num_unseen == 0


def test_a_worker_without_outstanding_work_has_no_ledger():
    work = SentWork(LAG)
    work.add("w", 1, SentItem(1.0, 100, 7))
    work.see("w", 1)
    assert work.of("w") is not None
    work.remove("w", 1)
    work.remove("w", 1)
    work.see("w", 1)
    assert work.of("w") is None


@pytest.mark.parametrize("seed", range(20))
def test_totals_are_the_sums_of_what_is_unseen(seed):
    rng = random.Random(seed)
    work, items, now = SentWork(LAG), {}, 0.0
    for decision_id in range(200):
        now += rng.choice([0.0, 0.02, 0.1])
        items[decision_id] = SentItem(now, rng.randint(0, 50), rng.randint(0, 5))
        work.add("w", decision_id, items[decision_id])
        gone = rng.choice(sorted(items))
        if rng.random() < 0.8:
            work.remove("w", gone)
            del items[gone]
        if ledger := work.of("w"):
            ledger.settle(now, 0)
            unseen = [item for item in items.values() if item.sent_at + LAG > now]
            assert ledger.num_unseen == len(unseen)
            assert ledger.num_unseen_prefill_tokens == sum(i.num_prefill_tokens for i in unseen)
            assert ledger.num_unseen_blocks == sum(i.num_blocks for i in unseen)
            assert ledger.num_outstanding == len(items)
        else:
            assert not items
