"""A link that one end gives up: what had landed counts, and nobody is left with half of it."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from handoff_pair import WAIT_SECONDS, Pair, wait_until
from nccl_stand_in import Group, stand_in_transport
from torch import Tensor

from antiphon.errors import LinkBrokenError, WorkerBusyError
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.segment import SenderAccount

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]


def begin_to_write(pair: Pair) -> threading.Event:
    """Two segments are sent and the first one is being written; it ends with the event."""
    pair.target.scatter_gate = threading.Event()
    transfer_id = pair.begin(SOURCE, TARGET, 0, 8)
    pair.sender.push(transfer_id, SOURCE, 0, 8)
    assert pair.target.scatter_began.wait(WAIT_SECONDS)
    return pair.target.scatter_gate


def test_what_had_landed_when_the_sender_closed_the_link_counts(
    make_memory_pair: Callable[..., Pair],
) -> None:
    pair = make_memory_pair()
    go_on = begin_to_write(pair)
    wait_until(lambda: pair.sender.counters().segments == 2)
    pair.sender.close()
    go_on.set()
    _, num_tokens, error = pair.next_completed()
    assert (num_tokens, type(error)) == (8, LinkBrokenError)
    assert pair.arrived(SOURCE, TARGET, 0, 8)


def test_nothing_counts_once_the_receiver_has_closed_the_link(
    make_memory_pair: Callable[..., Pair],
) -> None:
    pair = make_memory_pair()
    go_on = begin_to_write(pair)
    wait_until(lambda: pair.sender.counters().segments == 2)
    (link,) = pair.receiver._links
    closing = threading.Thread(target=pair.receiver.close)
    closing.start()
    wait_until(lambda: link._link.wire.broken)
    go_on.set()
    closing.join(WAIT_SECONDS)
    _, num_tokens, error = pair.next_completed()
    assert (num_tokens, type(error)) == (4, LinkBrokenError)
    assert not pair.target.tokens(TARGET, 4, 8).any()


class NotingGroup(Group):
    """Counts what goes beside the headers, the byte of the set-up included."""

    by_rank: ClassVar[dict[int, "NotingGroup"]] = {}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_sent = self.num_received = 0
        NotingGroup.by_rank[self._rank] = self

    def send(self, tensors: list[Tensor], *args: Any) -> Any:
        self.num_sent += 1
        return super().send(tensors, *args)

    def recv(self, tensors: list[Tensor], *args: Any) -> Any:
        self.num_received += 1
        return super().recv(tensors, *args)


@pytest.fixture
def noting_pair() -> Iterator[Pair]:
    transports = [stand_in_transport("127.0.0.1", NotingGroup) for _ in range(2)]
    pair = Pair(*transports)
    yield pair
    pair.close()
    NotingGroup.by_rank.clear()


def test_kv_beside_a_header_that_had_landed_is_not_waited_for(noting_pair: Pair) -> None:
    """On a GPU it would be waited for until its time-out, with every transfer of the link."""
    go_on = begin_to_write(noting_pair)
    wait_until(lambda: NotingGroup.by_rank[1].num_sent == 1 + 2)
    noting_pair.sender.close()
    go_on.set()
    _, num_tokens, error = noting_pair.next_completed()
    assert (num_tokens, type(error)) == (4, LinkBrokenError)
    assert NotingGroup.by_rank[0].num_received == 1 + 1


@pytest.mark.parametrize("is_made", [True, False])
def test_an_idle_link_that_is_retired_is_closed(
    make_memory_pair: Callable[..., Pair], is_made: bool
) -> None:
    """Its last transfer may have ended just before, and then no end of one will close it."""
    pair = make_memory_pair()
    if is_made:
        pair.transfer(SOURCE, TARGET, 0, 4)
        pair.next_done()
        assert pair.next_completed()[2] is None
    offer = pair.receiver.offer("prefill-1")
    pair.receiver.retire(offer.link_id)
    assert pair.receiver.num_links == 0
    pair.sender.open("0" * 32, offer, 0)
    pair.send_all("0" * 32, SOURCE, 0, 4)
    assert isinstance(pair.next_done()[1], LinkBrokenError)


def test_a_transfer_that_was_cancelled_as_its_end_came_is_not_complete(
    make_memory_pair: Callable[..., Pair],
) -> None:
    pair = make_memory_pair()
    offer = pair.receiver.offer("prefill-1")
    transfer = pair.receiver.expect("0" * 32, offer.link_id, TARGET, 0, 4)
    assert pair.receiver.cancel("0" * 32)
    pair.receiver.complete(transfer, SenderAccount())
    assert pair.receiver.counters().transfers == 0
    assert pair.completed.empty()


@pytest.mark.parametrize("is_prewarm", [True, False])
def test_a_link_whose_thread_cannot_be_started_is_tried_again(
    make_memory_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, is_prewarm: bool
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def start(receiver: HandoffReceiver) -> None:
        if is_prewarm:
            receiver.prewarm("prefill-1")
        else:
            receiver.expect("0" * 32, receiver.offer("prefill-1").link_id, TARGET, 0, 4)

    pair = make_memory_pair(receiver_limits=ReceiverLimits(timeout_seconds=2))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WorkerBusyError, match="can't start new thread"):
            start(pair.receiver)
    assert pair.receiver.num_pending == 0
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 4)
    assert pair.next_completed() == (transfer_id, 4, None)
