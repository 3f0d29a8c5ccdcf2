"""What must never reach a block, one test for each; every kind of message is named."""

import threading

import pytest
import torch
from handoff_pair import BYTES_PER_TOKEN, wait_until

from antiphon.errors import SegmentRejectedError
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.segment import Epochs, Header, Kind, as_tensor, checksum

TABLE = [2, 6]


class Raw:
    """Sends messages of its own making over a pair's open link, and watches the blocks."""

    def __init__(self, pair) -> None:
        self.pair = pair
        first = pair.transfer([0], [0], 0, 4)
        assert pair.next_completed() == (first, 4, None)
        pair.next_done()
        (self._link,) = pair.sender._links.values()
        self.transfer_id = pair.begin(TABLE, TABLE, 0, 8)
        pair.target.slots.fill_(77)

    def send(self, transfer_id=None, span=(0, 4), kind=Kind.DATA, sender="prefill-1", **change):
        payload = torch.full(((span[1] - span[0]) * BYTES_PER_TOKEN,), 5, dtype=torch.uint8)
        fields = {"num_payload_bytes": payload.numel(), "payload_checksum": checksum(payload)}
        header = Header(
            kind,
            Epochs.of(sender, change.pop("receiver", "decode-1")),
            bytes.fromhex(transfer_id or self.transfer_id),
            *span,
            **{**fields, **change},
        )
        self._link._link.send([torch.cat([as_tensor(header.pack()), payload])], 5)

    def assert_untouched(self, **discarded: int) -> None:
        wait_until(lambda: self.pair.receiver.counters().discarded_segments == discarded)
        assert self.pair.target.slots.eq(77).all()


@pytest.fixture
def raw(make_memory_pair) -> Raw:
    limits = ReceiverLimits(timeout_seconds=5, segment_bytes=9 * BYTES_PER_TOKEN)
    return Raw(make_memory_pair(receiver_limits=limits))


def test_stale(raw):
    raw.send(sender="prefill-0")
    raw.send(receiver="decode-0")
    raw.assert_untouched(stale_epoch=2)
    raw.send()  # the transfer goes on
    wait_until(lambda: raw.pair.receiver.find(raw.transfer_id).num_received == 4)


def test_over_another_link(raw):
    offer = raw.pair.receiver.offer("prefill-2")
    raw.pair.receiver.expect("a" * 32, offer.link_id, TABLE, 0, 4)
    raw.send("a" * 32)
    raw.assert_untouched(wrong_link=1)
    assert raw.pair.receiver.cancel("a" * 32), "it was live, and still is"


def test_unknown(raw):
    raw.send("f" * 32)
    raw.assert_untouched(unknown_transfer=1)


def test_cancelled(raw):
    assert raw.pair.receiver.cancel(raw.transfer_id)
    raw.send()
    raw.assert_untouched(unknown_transfer=1)


def test_duplicate(raw):
    raw.send()
    wait_until(lambda: raw.pair.receiver.find(raw.transfer_id).num_received == 4)
    raw.pair.target.slots.fill_(77)
    raw.send()
    raw.assert_untouched(duplicate=1)


def test_reordered(raw):
    raw.send(span=(4, 8))
    raw.assert_untouched(range=1)
    assert isinstance(raw.pair.next_completed()[2], SegmentRejectedError)


def test_corrupt(raw):
    raw.send(payload_checksum=1)
    raw.assert_untouched(checksum=1)
    assert isinstance(raw.pair.next_completed()[2], SegmentRejectedError)


def test_beyond_the_end(raw):
    raw.send(span=(0, 9))
    raw.assert_untouched(range=1)
    assert isinstance(raw.pair.next_completed()[2], SegmentRejectedError)


def test_too_few_bytes(raw):
    raw.send(num_payload_bytes=3 * BYTES_PER_TOKEN)
    raw.assert_untouched(size=1)
    assert isinstance(raw.pair.next_completed()[2], SegmentRejectedError)


def test_oversized(raw):
    """More than the receiver stages: what follows cannot be told, so the link breaks."""
    raw.send(num_payload_bytes=9 * BYTES_PER_TOKEN + 1)
    error = raw.pair.next_completed()[2]
    assert isinstance(error, SegmentRejectedError)
    assert "217 payload bytes do not fit" in str(error)
    assert raw.pair.target.slots.eq(77).all()
    wait_until(lambda: raw.pair.receiver.counters().broken_links == 1)


def test_a_second_handshake(raw):
    raw.send(kind=Kind.HELLO, span=(0, 0))
    raw.assert_untouched(kind=1)
    assert isinstance(raw.pair.next_completed()[2], SegmentRejectedError)


def test_what_was_received_ahead_of_a_cancel_is_not_written_after_it(make_memory_pair):
    """The second segment is in its buffer while the first is being written: cancel beats it."""
    pair = make_memory_pair()
    pair.target.scatter_gate = threading.Event()
    transfer_id = pair.begin(TABLE, TABLE, 0, 8)
    pair.send_all(transfer_id, TABLE, 0, 8)
    assert pair.target.scatter_began.wait(5)
    assert pair.next_done()[1] is None  # both segments and END are on the receiver's side
    cancelled: list[bool] = []
    transfer = pair.receiver.find(transfer_id)
    fencing = threading.Thread(target=lambda: cancelled.append(pair.receiver.cancel(transfer_id)))
    # Locks are not fair: the fence must be the next to get this one.
    original_take = transfer.take

    def take_after_the_fence(*args):
        fencing.join(5)
        return original_take(*args)

    transfer.take = take_after_the_fence
    fencing.start()
    pair.target.scatter_gate.set()
    fencing.join(5)
    assert cancelled == [True]
    pair.target.poisoned |= set(TABLE)  # another request's, from here on
    wait_until(lambda: pair.receiver.counters().discarded_segments == {"unknown_transfer": 2})
    assert pair.arrived(TABLE, TABLE, 0, 4)
    assert not pair.target.tokens(TABLE, 4, 8).any()
    pair.target.poisoned.clear()
