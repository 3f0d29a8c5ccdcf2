"""Whole transfers, over every kind of transport."""

import threading

import pytest
from handoff_pair import BYTES_PER_TOKEN, WIRE, Pair, wait_until
from msgspec import structs

from antiphon.errors import (
    HandoffError,
    LayoutMismatchError,
    LinkBrokenError,
    SegmentRejectedError,
    WorkerBusyError,
)
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.sender import SenderLimits
from antiphon.workers.handoff.wire import WireFormat

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]


def test_a_transfer_moves_exactly_its_tokens(pair):
    transfer_id = pair.transfer(SOURCE, TARGET, 3, 19)
    assert pair.next_completed() == (transfer_id, 16, None)
    assert pair.arrived(SOURCE, TARGET, 3, 19)
    assert not pair.target.tokens(TARGET, 0, 3).any()
    assert not pair.target.tokens(TARGET, 19, 20).any()
    done_id, error, num_bytes, seconds = pair.next_done()
    assert (done_id, error, num_bytes) == (transfer_id, None, 16 * BYTES_PER_TOKEN)
    assert seconds > 0
    counters = pair.receiver.counters()
    assert (counters.segments, counters.received_bytes) == (5, 16 * BYTES_PER_TOKEN)
    assert counters.discarded_segments == {}


def test_chunks_are_sent_while_later_ones_compute(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    for start, end in ((0, 5), (5, 6), (6, 20)):
        pair.sender.push(transfer_id, SOURCE, start, end)
        wait_until(lambda end=end: pair.arrived(SOURCE, TARGET, 0, end))
        assert pair.completed.empty()
    pair.sender.finish(transfer_id)
    assert pair.next_completed() == (transfer_id, 20, None)


def test_one_link_serves_many_transfers(pair):
    ids = {pair.begin([i], [i + 20], 0, 4): i for i in range(20)}
    for transfer_id, i in reversed(ids.items()):
        pair.send_all(transfer_id, [i], 0, 4)
    assert {pair.next_completed() for _ in ids} == {(each, 4, None) for each in ids}
    assert all(pair.arrived([i], [i + 20], 0, 4) for i in ids.values())
    assert pair.sender.num_links == pair.receiver.num_links == 1


def test_abort_tells_the_receiver_why(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(transfer_id, SOURCE, 0, 7)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 7))
    pair.sender.abort(transfer_id, "the client left")
    completed_id, num_tokens, error = pair.next_completed()
    assert (completed_id, num_tokens) == (transfer_id, 7)
    assert type(error) is HandoffError
    assert "the client left" in str(error)
    assert "the client left" in str(pair.next_done()[1])


def test_an_incomplete_end_is_not_taken_for_complete(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.send_all(transfer_id, SOURCE, 0, 19)
    completed_id, num_tokens, error = pair.next_completed()
    assert (completed_id, num_tokens) == (transfer_id, 19)
    assert isinstance(error, SegmentRejectedError)
    assert "19 of 20 tokens arrived" in str(error)


def test_cancel_fences_and_late_segments_are_discarded(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(transfer_id, SOURCE, 0, 4)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    assert pair.receiver.cancel(transfer_id)
    pair.target.poisoned |= set(TARGET)
    pair.sender.push(transfer_id, SOURCE, 4, 20)
    pair.sender.finish(transfer_id)
    assert pair.next_done()[1] is None
    wait_until(lambda: pair.receiver.counters().discarded_segments == {"unknown_transfer": 5})
    pair.target.poisoned.clear()
    # The link stays in step.
    next_id = pair.transfer(SOURCE, TARGET, 0, 20)
    assert pair.next_completed() == (next_id, 20, None)
    assert not pair.receiver.cancel(next_id)


def test_the_answer_to_a_cancel_is_not_counted_as_thrown_away(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    assert pair.receiver.cancel(transfer_id)
    pair.sender.abort(transfer_id, "the client left")
    assert pair.next_done()[0] == transfer_id
    next_id = pair.transfer(SOURCE, TARGET, 0, 20)  # over the same link, so after it
    assert pair.next_completed() == (next_id, 20, None)
    assert pair.receiver.counters().discarded_segments == {}


def test_cancel_waits_for_the_scatter_under_way(pair):
    pair.target.scatter_gate = threading.Event()
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(transfer_id, SOURCE, 0, 4)
    assert pair.target.scatter_began.wait(5)
    cancelled: list[bool] = []
    cancelling = threading.Thread(
        target=lambda: cancelled.append(pair.receiver.cancel(transfer_id))
    )
    cancelling.start()
    cancelling.join(0.05)
    assert cancelled == []
    pair.target.scatter_gate.set()
    cancelling.join(5)
    assert cancelled == [True]
    assert pair.completed.empty()


def test_receiver_death_reaches_the_sender(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(transfer_id, SOURCE, 0, 4)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    pair.receiver.close()
    assert isinstance(pair.next_completed()[2], LinkBrokenError)
    pair.send_all(transfer_id, SOURCE, 4, 20)
    assert isinstance(pair.next_done()[1], LinkBrokenError)
    wait_until(lambda: pair.sender.num_links == 0)
    pair.sender.push(transfer_id, SOURCE, 20, 20)  # harmless after the end


def test_sender_death_fails_its_transfers_and_the_next_link_is_fresh(pair):
    first = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(first, SOURCE, 0, 4)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    old_offer = pair.receiver.offer("prefill-1")
    pair.sender.close()
    assert isinstance(pair.next_completed()[2], LinkBrokenError)
    wait_until(lambda: pair.receiver.num_links == 0)
    assert pair.receiver.counters().broken_links == 1
    assert pair.receiver.offer("prefill-1").link_id != old_offer.link_id
    with pytest.raises(LinkBrokenError, match="ask for a new offer"):
        pair.receiver.expect("0" * 32, old_offer.link_id, TARGET, 0, 4)


def test_another_layout_is_refused_by_name(transports):
    wire = WireFormat("model-b", WIRE.layers, "bfloat16")
    pair = Pair(*transports, sender_wire=wire)
    pair.transfer(SOURCE, TARGET, 0, 4)
    pair.target.poisoned |= set(TARGET)
    for error in (pair.next_completed()[2], pair.next_done()[1]):
        assert isinstance(error, LayoutMismatchError)
        assert "model fingerprint is" in str(error)
        assert '"bfloat16"' in str(error)
        assert "layers" not in str(error)
    pair.close()


def test_a_restarted_sender_is_a_stranger(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 4, peer="prefill-0")
    pair.send_all(transfer_id, SOURCE, 0, 4)
    error = pair.next_completed()[2]
    assert isinstance(error, SegmentRejectedError)
    assert "sender epoch" in str(error)
    assert isinstance(pair.next_done()[1], LinkBrokenError)
    assert not pair.target.slots.any()


def test_a_sender_lets_go_of_a_link_that_is_not_offered_any_more_and_what_has_landed_counts(pair):
    pair.target.scatter_gate = threading.Event()
    first = pair.transfer(SOURCE, TARGET, 0, 4)
    assert pair.target.scatter_began.wait(5)
    assert pair.next_done()[:2] == (first, None)  # END has landed; the receiver still writes
    pair.receiver.retire(pair.receiver.offer("prefill-1").link_id)  # as when the peer seems to hang
    second = pair.transfer(SOURCE, TARGET, 4, 8)
    assert pair.sender.num_links == 1
    pair.target.scatter_gate.set()
    assert {pair.next_completed() for _ in range(2)} == {(first, 4, None), (second, 4, None)}
    assert pair.sender.num_links == 1


def test_a_sender_lets_go_of_a_link_in_use_that_is_not_offered_any_more_after_its_last_transfer(
    pair,
):
    first = pair.begin(SOURCE, TARGET, 0, 4)
    pair.sender.push(first, SOURCE, 0, 4)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    pair.receiver.retire(pair.receiver.offer("prefill-1").link_id)  # as after a stall
    second = pair.transfer(SOURCE, TARGET, 4, 8)
    assert pair.next_completed() == (second, 4, None)
    assert pair.sender.num_links == pair.receiver.num_links == 2
    pair.sender.finish(first)
    assert pair.next_completed() == (first, 4, None)
    wait_until(lambda: pair.sender.num_links == pair.receiver.num_links == 1)
    third = pair.transfer(SOURCE, TARGET, 8, 12)
    assert pair.next_completed() == (third, 4, None)
    assert pair.sender.counters().links_made == 2


def test_a_receiver_gives_up_the_link_of_a_lost_sender_after_its_last_transfer(pair):
    used = pair.begin(SOURCE, TARGET, 0, 4)
    pair.receiver.leave("prefill-1")
    pair.send_all(used, SOURCE, 0, 4)
    assert pair.next_completed() == (used, 4, None)
    wait_until(lambda: pair.receiver.num_links == 0)
    again = pair.transfer(SOURCE, TARGET, 4, 8)
    assert pair.next_completed() == (again, 4, None)


@pytest.mark.parametrize("is_used", [True, False])
def test_a_sender_gives_up_the_link_of_a_lost_receiver(pair, is_used):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 4)
    if is_used:
        pair.sender.abort(transfer_id, "lost")
    else:
        pair.send_all(transfer_id, SOURCE, 0, 4)
        assert pair.next_done()[0] == pair.next_completed()[0] == transfer_id
    pair.sender.leave("decode-1")
    wait_until(lambda: pair.sender.num_links == pair.receiver.num_links == 0)
    again = pair.transfer(SOURCE, TARGET, 4, 8)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 4, 8))
    assert again in {pair.next_completed()[0] for _ in range(1 + is_used)}


def test_a_silent_sender_times_out_and_gets_another_link(make_memory_pair):
    limits = ReceiverLimits(timeout_seconds=0.05, io_timeout_seconds=1)
    pair = make_memory_pair(receiver_limits=limits)
    offer = pair.receiver.offer("prefill-1")
    pair.receiver.expect("0" * 32, offer.link_id, TARGET, 0, 4)
    completed_id, num_tokens, error = pair.next_completed()
    assert (completed_id, num_tokens) == ("0" * 32, 0)
    assert "0 of 4 tokens arrived in 0.05 s; timed out" in str(error)
    assert pair.receiver.offer("prefill-1").link_id != offer.link_id


def test_links_are_bounded(make_memory_pair):
    limits = ReceiverLimits(timeout_seconds=5, max_links=2)
    pair = make_memory_pair(receiver_limits=limits)
    for i in range(2):
        offer = pair.receiver.offer(f"peer-{i}")
        pair.receiver.expect(f"{i}" * 32, offer.link_id, TARGET, 0, 4)
    with pytest.raises(WorkerBusyError, match="all 2 hand-off links"):
        pair.receiver.offer("peer-2")
    assert pair.receiver.cancel("0" * 32)
    pair.receiver.offer("peer-2")
    assert pair.receiver.num_links == 2


def test_the_least_recently_used_idle_link_makes_room(make_memory_pair):
    pair = make_memory_pair(sender_limits=SenderLimits(timeout_seconds=5, max_links=1))
    first = pair.begin(SOURCE, TARGET, 0, 4)
    elsewhere = structs.replace(
        pair.receiver.offer("prefill-1"), address="nobody:0", receiver_incarnation="decode-2"
    )
    with pytest.raises(WorkerBusyError, match="all 1 hand-off links"):
        pair.sender.open("1" * 32, elsewhere, 0)
    pair.send_all(first, SOURCE, 0, 4)
    assert pair.next_completed() == (first, 4, None)
    pair.next_done()
    pair.sender.open("1" * 32, elsewhere, 0)
    assert "nobody listens" in str(pair.next_done()[1])
    wait_until(lambda: pair.receiver.num_links == 0)


def test_of_two_links_one_dies_and_the_other_goes_on(pair):
    offer = pair.receiver.offer("prefill-1")
    pair.receiver.expect("0" * 32, offer.link_id, TARGET, 0, 20)
    pair.sender.open("0" * 32, offer, 0)
    dead = pair.receiver.offer("prefill-0")  # the sender is not prefill-0: this link will break
    pair.receiver.expect("1" * 32, dead.link_id, [40], 0, 4)
    pair.sender.open("1" * 32, dead, 0)
    pair.send_all("1" * 32, SOURCE, 0, 4)
    assert pair.next_completed()[0] == "1" * 32
    pair.send_all("0" * 32, SOURCE, 0, 20)
    assert pair.next_completed() == ("0" * 32, 20, None)
    assert pair.arrived(SOURCE, TARGET, 0, 20)


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_failing_store_fails_only_its_transfer(pair, end):
    store = getattr(pair, end)
    store.fail_with = RuntimeError("device lost")
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 4)
    completed_id, _, error = pair.next_completed()
    assert completed_id == transfer_id
    assert "device lost" in str(error)
    pair.next_done()
    store.fail_with = None
    next_id = pair.transfer(SOURCE, TARGET, 0, 4)
    assert pair.next_completed() == (next_id, 4, None)


def test_pushes_must_continue(pair):
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    with pytest.raises(ValueError, match=r"pushed \[4, 8\) after token 0"):
        pair.sender.push(transfer_id, SOURCE, 4, 8)
