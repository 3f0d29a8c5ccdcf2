"""What goes wrong on a link, by name; send 0 of a link is its handshake."""

import pytest
import torch
from handoff_pair import BYTES_PER_TOKEN, wait_until
from memory_transport import Fault, FaultPlan

from antiphon.errors import LinkBrokenError, SegmentRejectedError
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.segment import Epochs, Header, Kind, as_tensor, checksum

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]


def test_a_late_write_never_reaches_blocks_of_another_request(make_memory_pair):
    plan = FaultPlan({2: Fault.HOLD})
    pair = make_memory_pair(plan)
    pair.transfer(SOURCE, TARGET, 0, 20)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    for transfer_id in list(pair.receiver._transfers):
        assert pair.receiver.cancel(transfer_id)
    pair.target.slots.fill_(77)  # the blocks belong to somebody else now
    plan.release()
    assert pair.next_done()[1] is None
    wait_until(lambda: pair.receiver.counters().discarded_segments == {"unknown_transfer": 5})
    assert pair.target.slots.eq(77).all()


def test_a_duplicate_segment_is_discarded(make_memory_pair):
    pair = make_memory_pair(FaultPlan({2: Fault.DUPLICATE}))
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    assert pair.next_completed() == (transfer_id, 20, None)
    assert pair.arrived(SOURCE, TARGET, 0, 20)
    assert pair.receiver.counters().discarded_segments == {"duplicate": 1}


def test_a_corrupt_payload_costs_only_its_transfer(make_memory_pair):
    pair = make_memory_pair(FaultPlan({2: Fault.CORRUPT_PAYLOAD}))
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    completed_id, num_tokens, error = pair.next_completed()
    assert (completed_id, num_tokens) == (transfer_id, 4)
    assert isinstance(error, SegmentRejectedError)
    assert "segment [4, 8) is corrupt" in str(error)
    assert not pair.target.tokens(TARGET, 4, 20).any()
    next_id = pair.transfer(SOURCE, TARGET, 0, 20)
    assert pair.next_completed() == (next_id, 20, None)
    assert pair.receiver.counters().broken_links == 0


def test_a_corrupt_header_breaks_the_link(make_memory_pair):
    pair = make_memory_pair(FaultPlan({2: Fault.CORRUPT_HEADER}))
    pair.transfer(SOURCE, TARGET, 0, 20)
    _, num_tokens, error = pair.next_completed()
    assert num_tokens == 4
    assert "wrong header checksum" in str(error)
    assert isinstance(pair.next_done()[1], LinkBrokenError)
    assert pair.receiver.counters().broken_links == 1


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.SWAP])
def test_a_gap_fails_the_transfer(make_memory_pair, fault):
    pair = make_memory_pair(FaultPlan({2: fault}))
    pair.transfer(SOURCE, TARGET, 0, 20)
    _, num_tokens, error = pair.next_completed()
    assert num_tokens == 4
    assert isinstance(error, SegmentRejectedError)
    assert "segment [8, 12) does not continue at token 4" in str(error)
    assert not pair.target.tokens(TARGET, 4, 20).any()


def test_a_lost_end_times_out(make_memory_pair):
    limits = ReceiverLimits(timeout_seconds=0.1, io_timeout_seconds=1)
    pair = make_memory_pair(FaultPlan({6: Fault.DROP}), receiver_limits=limits)
    pair.transfer(SOURCE, TARGET, 0, 20)
    assert "20 of 20 tokens arrived in 0.1 s; timed out" in str(pair.next_completed()[2])
    wait_until(lambda: pair.receiver.num_links == 0)


@pytest.mark.parametrize("fault", [Fault.BREAK_BEFORE, Fault.BREAK_AFTER])
@pytest.mark.parametrize("step", range(7))
def test_the_link_may_die_at_any_step(make_memory_pair, fault, step):
    limits = ReceiverLimits(timeout_seconds=0.3, io_timeout_seconds=1)
    pair = make_memory_pair(FaultPlan({step: fault}), receiver_limits=limits)
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    completed_id, num_tokens, error = pair.next_completed()
    assert completed_id == transfer_id
    assert (error is None) == (num_tokens == 20 and step == 6 and fault is Fault.BREAK_AFTER) or (
        isinstance(error, LinkBrokenError)
    )
    assert pair.arrived(SOURCE, TARGET, 0, num_tokens) or num_tokens == 0
    assert pair.next_done()[0] == transfer_id


class _RawSender:
    """Sends headers of its own making over the pair's established link."""

    def __init__(self, pair) -> None:
        self.pair = pair
        first = pair.transfer([0], [0], 0, 4)
        assert pair.next_completed() == (first, 4, None)
        pair.next_done()
        (self.sender_link,) = pair.sender._links.values()

    def send(self, transfer_id: str, span=(0, 4), sender="prefill-1", receiver="decode-1") -> None:
        payload = self.pair.source.tokens([1], 0, 4).reshape(-1).contiguous()
        header = Header(
            Kind.DATA,
            Epochs.of(sender, receiver),
            bytes.fromhex(transfer_id),
            *span,
            payload.numel(),
            checksum(payload),
        )
        message = torch.cat([as_tensor(header.pack()), payload])
        self.sender_link._link.send([message], 5)

    def wait_discarded(self, **expected: int) -> None:
        wait_until(lambda: self.pair.receiver.counters().discarded_segments == expected)


def test_an_unknown_transfer_is_discarded(make_memory_pair):
    raw = _RawSender(make_memory_pair())
    before = raw.pair.target.slots.clone()
    raw.send("f" * 32)
    raw.wait_discarded(unknown_transfer=1)
    assert raw.pair.target.slots.equal(before)


@pytest.mark.parametrize("stale", [{"sender": "prefill-0"}, {"receiver": "decode-0"}])
def test_a_stale_epoch_is_discarded(make_memory_pair, stale):
    raw = _RawSender(make_memory_pair())
    transfer_id = raw.pair.begin(SOURCE, TARGET, 0, 4)
    raw.send(transfer_id, **stale)
    raw.wait_discarded(stale_epoch=1)
    assert not raw.pair.target.tokens(TARGET, 0, 4).any()
    raw.pair.send_all(transfer_id, SOURCE, 0, 4)
    assert raw.pair.next_completed() == (transfer_id, 4, None)


def test_a_segment_over_another_link_is_discarded(make_memory_pair):
    raw = _RawSender(make_memory_pair())
    offer = raw.pair.receiver.offer("prefill-2")
    raw.pair.receiver.expect("a" * 32, offer.link_id, TARGET, 0, 4)
    raw.send("a" * 32)
    raw.wait_discarded(wrong_link=1)
    assert raw.pair.receiver.cancel("a" * 32)


@pytest.mark.parametrize(
    ("span", "word"),
    [((0, 3), "size"), ((0, 5), "range"), ((1, 5), "range"), ((4, 8), "range")],
)
def test_a_segment_of_the_wrong_shape_fails_its_transfer(make_memory_pair, span, word):
    raw = _RawSender(make_memory_pair())
    transfer_id = raw.pair.begin(SOURCE, TARGET, 0, 4)
    raw.send(transfer_id, span=span)
    completed_id, num_tokens, error = raw.pair.next_completed()
    assert (completed_id, num_tokens) == (transfer_id, 0)
    assert isinstance(error, SegmentRejectedError)
    assert str(error).startswith(word)
    assert not raw.pair.target.tokens(TARGET, 0, 4).any()
    assert raw.pair.receiver.counters().received_bytes == 4 * BYTES_PER_TOKEN
