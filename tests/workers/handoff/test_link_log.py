"""What goes wrong with a link is in the log of both ends, by name, and counted as what it is."""

import logging

import pytest
from handoff_pair import WIRE, wait_until
from memory_transport import Fault, FaultPlan

from antiphon.workers.handoff import link_log
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.wire import WireFormat

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]
CHANGES = {
    "model": WireFormat("model-b", WIRE.layers, WIRE.dtype),
    "layout": WireFormat(WIRE.model_fingerprint, ((2, 3, 3),), WIRE.dtype),
    "dtype": WireFormat(WIRE.model_fingerprint, WIRE.layers, "bfloat16"),
}


class Lines:
    """Of the hand-off's log."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO, logger=link_log.__name__)

    def __call__(self, *words: str) -> list[str]:
        """Those that hold all of these words."""
        records = [r for r in self._caplog.records if r.name == link_log.__name__]
        lines = [record.getMessage() for record in records]
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


@pytest.mark.parametrize(("reason", "wire"), CHANGES.items(), ids=CHANGES)
def test_a_refused_link_is_named_at_both_ends_once(make_memory_pair, lines, reason, wire):
    pair = make_memory_pair(sender_wire=wire)
    for _ in range(3):
        pair.transfer([1], [1], 0, 4)
        pair.next_completed()
        pair.next_done()
    for end in (pair.sender, pair.receiver):
        wait_until(lambda end=end: end.counters().refused_links == {reason: 3})
        assert end.counters().broken_links == 0
    for words in ("receiver:0", "the receiver has another"), ("prefill-1", "the sender has"):
        (line,) = lines(f"was refused ({reason})", *words)
        assert "is " in line
    assert pair.receiver.counters().failed_prewarms == {}


def test_a_refusal_before_any_transfer_is_a_failed_prewarm(make_memory_pair, lines):
    pair = make_memory_pair(sender_wire=CHANGES["model"])
    pair.sender.prewarm(pair.receiver.prewarm("prefill-1"))
    wait_until(lambda: pair.receiver.counters().failed_prewarms == {"refused": 1})
    wait_until(lambda: pair.sender.counters().refused_links == {"model": 1})
    assert len(lines("was refused (model)", "model fingerprint is")) == 2
    assert pair.receiver.counters().prewarmed_links == 0


def test_a_prewarmed_link_that_nobody_connects_to_is_named(make_memory_pair, lines):
    limits = ReceiverLimits(timeout_seconds=0.05, io_timeout_seconds=1)
    pair = make_memory_pair(receiver_limits=limits)
    pair.receiver.prewarm("prefill-1", "the first")
    wait_until(lambda: pair.receiver.counters().failed_prewarms == {"no_answer": 1})
    assert len(lines("offered to the first", "did not connect")) == 1
    assert pair.receiver.num_links == 0


def test_a_broken_link_is_named_with_its_transfers(make_memory_pair, lines):
    pair = make_memory_pair(FaultPlan({3: Fault.BREAK_BEFORE}))
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    pair.next_completed()
    pair.next_done()
    wait_until(lambda: len(lines("broke", transfer_id)) == 2)
    assert len(lines("broke", transfer_id, "with prefill-1")) == 1
    for end in (pair.sender, pair.receiver):
        assert (end.counters().broken_links, end.counters().refused_links) == (1, {})


def test_a_link_that_the_sender_says_broke_is_counted_though_this_end_closes_it(
    make_memory_pair, lines
):
    pair = make_memory_pair()
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    wait_until(lambda: pair.receiver.counters().links_made == 1)
    link_id = pair.receiver.offer("prefill-1").link_id
    pair.receiver.broke(link_id, "a segment was not taken in 10 s")
    assert pair.receiver.offer("prefill-1").link_id != link_id
    assert pair.receiver.cancel(transfer_id)
    wait_until(lambda: pair.receiver.counters().broken_links == 1)
    (line,) = lines("broke: the sender says: a segment was not taken", "prefill-1")
    assert link_id in line
    assert lines("is given up") == []


def test_a_link_that_this_worker_closes_is_no_news(make_memory_pair, lines):
    pair = make_memory_pair()
    pair.transfer(SOURCE, TARGET, 0, 20)
    pair.next_completed()
    pair.next_done()
    pair.receiver.close()
    assert lines("prefill-1") == []
    assert pair.receiver.counters().broken_links == 0


def test_a_rejected_segment_is_named_and_what_comes_late_is_counted(make_memory_pair, lines):
    plan = FaultPlan({2: Fault.CORRUPT_PAYLOAD})
    pair = make_memory_pair(plan)
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    pair.next_completed()
    pair.next_done()
    (line,) = lines("segment rejected: checksum: segment [4, 8)", "prefill-1")
    assert transfer_id in line
    wait_until(lambda: pair.receiver.counters().discarded_segments.get("unknown_transfer", 0) > 2)
    assert len(lines("(unknown_transfer)", transfer_id, "prefill-1")) == 1


def test_quarantined_staging_is_named(make_memory_pair, lines):
    pair = make_memory_pair()
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    assert pair.next_completed() == (transfer_id, 20, None)
    pair.next_done()
    link_id = pair.receiver.offer("prefill-1").link_id
    pair.receiver.expect("0" * 32, link_id, TARGET, 0, 4)  # else it would be closed
    num_bytes = pair.receiver.counters().staging_bytes
    for _ in range(2):
        pair.receiver.retire(link_id)
    (line,) = lines("is given up", link_id)
    assert f"{num_bytes} bytes" in line
