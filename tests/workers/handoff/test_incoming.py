import threading
import time

import pytest
from handoff_pair import BYTES_PER_TOKEN, FakeStore
from torch import Tensor

from antiphon.errors import HandoffError, SegmentRejectedError
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.segment import Epochs, Header, Kind, checksum
from antiphon.workers.handoff.staging import Staging
from antiphon.workers.handoff.transport import Place

EPOCHS = Epochs.of("prefill-1", "decode-1")


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def target(store: FakeStore) -> Staging:
    return Staging(store, Place.HOST, lambda change: None)


@pytest.fixture
def incoming() -> Incoming:
    return Incoming("0" * 32, "link", (5, 6), (2, 8), time.monotonic())


def _segment(start: int, end: int) -> tuple[Header, Tensor]:
    source = FakeStore()
    source.fill_random(start)
    payload = source.slots[: end - start].reshape(-1)
    assert payload.numel() == (end - start) * BYTES_PER_TOKEN
    header = Header(Kind.DATA, EPOCHS, bytes(16), start, end, payload.numel(), checksum(payload))
    return header, payload


def test_nothing_is_written_after_the_fence(incoming, store, target):
    assert incoming.take(*_segment(2, 4), target) is None
    before = store.slots.clone()
    assert incoming.fence()
    assert incoming.take(*_segment(4, 6), target) == "unknown_transfer"
    assert store.slots.equal(before)
    assert incoming.num_received == 2


def test_a_fence_waits_for_no_checksum(incoming, store, target):
    """Which takes as long as a GPU has other things to do; ``cancel`` is called on the loop."""
    compute = target.checksum

    def fence_meanwhile(payload: Tensor) -> int:
        fencing = threading.Thread(target=incoming.fence, daemon=True)
        fencing.start()
        fencing.join(5)
        assert not fencing.is_alive()
        return compute(payload)

    target.checksum = fence_meanwhile
    assert incoming.take(*_segment(2, 4), target) == "unknown_transfer"
    assert not store.slots.any()


def test_a_damaged_segment_is_rejected_and_a_doubled_one_discarded(incoming, store, target):
    header, payload = _segment(2, 4)
    payload[0] ^= 1
    with pytest.raises(SegmentRejectedError, match=r"segment \[2, 4\) is corrupt"):
        incoming.take(header, payload, target)
    assert not store.slots.any()
    payload[0] ^= 1
    assert incoming.take(header, payload, target) is None
    assert incoming.take(header, payload, target) == "duplicate"


def test_only_one_caller_gets_to_end_it(incoming):
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(incoming.fence())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


@pytest.mark.parametrize("span", [(1, 3), (3, 5), (0, 2), (2, 9)])
def test_ranges_that_do_not_continue_are_rejected(incoming, store, target, span):
    with pytest.raises(SegmentRejectedError, match="does not continue at token 2"):
        incoming.take(*_segment(*span), target)
    assert not store.slots.any()


def test_an_ended_transfer_is_not_reported_again(make_memory_pair):
    pair = make_memory_pair()
    offer = pair.receiver.offer("prefill-1")
    pair.receiver.expect("0" * 32, offer.link_id, [0], 0, 4)
    transfer = pair.receiver.find("0" * 32)
    assert transfer is not None
    for reason in ("timed out", "link broke"):
        pair.receiver.end(transfer, HandoffError(reason))
    assert "timed out" in str(pair.next_completed()[2])
    assert pair.completed.empty()
    assert not pair.receiver.cancel("0" * 32)
