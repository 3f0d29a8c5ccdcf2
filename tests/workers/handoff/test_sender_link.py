"""What fails at the sender's own end: a read, a last word, a thread."""

from collections.abc import Callable
from typing import Any

import pytest
from handoff_pair import Pair, wait_until
from memory_transport import Fault, FaultPlan
from msgspec import structs

from antiphon.errors import HandoffError, LinkBrokenError, WorkerBusyError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff import sender_link
from antiphon.workers.handoff.sender import HandoffSender
from antiphon.workers.handoff.sender_link import SenderLink

SOURCE, TARGET = [3, 1, 4], [2, 6, 5]
OTHER_SOURCE, OTHER_TARGET = [20], [21]
MakePair = Callable[..., Pair]


def test_a_read_that_fails_leaves_alone_what_is_on_the_wire(make_memory_pair: MakePair) -> None:
    plan = FaultPlan({1: Fault.HOLD})  # the first segment
    pair = make_memory_pair(plan)  # segments of four tokens
    older = pair.begin(OTHER_SOURCE, OTHER_TARGET, 0, 4)
    gather, buffers = pair.source.gather, []

    def second_fails(block_table: list[int], start: int, end: int, out: Any) -> None:
        buffers.append(out.data_ptr())
        if len(buffers) == 2:
            pair.send_all(older, OTHER_SOURCE, 0, 4)  # which goes first from here on
            raise RuntimeError("device lost")
        gather(block_table, start, end, out)

    pair.source.gather = second_fails  # type: ignore[method-assign, assignment]
    failing = pair.transfer(SOURCE, TARGET, 0, 12)
    try:
        wait_until(lambda: len(buffers) == 3)
    finally:
        plan.release()
    on_the_wire, failed, of_the_older = buffers
    assert of_the_older == failed != on_the_wire
    assert pair.next_completed() == (older, 4, None)
    assert pair.arrived(OTHER_SOURCE, OTHER_TARGET, 0, 4)
    completed_id, num_tokens, error = pair.next_completed()
    assert (completed_id, num_tokens) == (failing, 4)
    assert "device lost" in str(error)


def test_a_last_word_that_cannot_be_made_ends_the_link_and_so_the_transfer(
    make_memory_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_memory_pair()

    def fail(*args: object) -> None:
        raise ValueError("no account")

    monkeypatch.setattr(sender_link, "account", fail)
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 4)
    done_id, error, *_ = pair.next_done()
    assert done_id == transfer_id
    assert isinstance(error, LinkBrokenError)
    assert "no account" in str(error)
    assert isinstance(pair.next_completed()[2], HandoffError)
    wait_until(lambda: pair.sender.num_links == pair.receiver.num_links == 0)


@pytest.mark.parametrize(
    "begin",
    [lambda sender, offer: sender.open("1" * 32, offer, 0), HandoffSender.prewarm],
    ids=["open", "prewarm"],
)
def test_a_thread_that_cannot_be_started_is_told_and_costs_no_link_its_end(
    make_memory_pair: MakePair,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[HandoffSender, LinkOffer], None],
) -> None:
    pair = make_memory_pair()
    pair.transfer(SOURCE, TARGET, 0, 4)
    pair.next_completed()
    pair.next_done()
    (left,) = pair.sender._links.values()
    another = structs.replace(left.offer, link_id="f" * 32)  # of the same receiver

    def fail(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(SenderLink, "start", fail)
        with pytest.raises(WorkerBusyError, match="can't start new thread"):
            begin(pair.sender, another)
    left.join()
    assert not left._thread.is_alive()
    assert pair.sender.num_links == 0
    wait_until(lambda: pair.receiver.num_links == 0)
    again = pair.transfer(SOURCE, TARGET, 4, 8)
    assert pair.next_completed() == (again, 4, None)
