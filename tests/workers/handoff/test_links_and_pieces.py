"""Which link makes room for another, what goes in pieces, and what overlaps the wire."""

from collections.abc import Callable, Iterator

import pytest
from handoff_pair import BYTES_PER_TOKEN, WIRE, FakeStore, Pair, wait_until
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport

from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]
MakePair = Callable[..., Pair]


class OneToMany:
    """A sender that may keep two links, and three receivers."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        self.receivers = [
            HandoffReceiver(
                Endpoint(MemoryTransport(network, f"r{i}"), FakeStore(), f"decode-{i}", WIRE),
                ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2),
                lambda *report: None,
            )
            for i in range(3)
        ]
        self._done: list[str] = []
        self.sender = HandoffSender(
            Endpoint(MemoryTransport(network, "s"), FakeStore(), "prefill", WIRE),
            SenderLimits(timeout_seconds=5, max_links=2),
            lambda transfer_id, *report: self._done.append(transfer_id),
        )

    def transfer(self, number: int, receiver: HandoffReceiver) -> None:
        transfer_id = f"{number:032x}"
        offer = receiver.offer("prefill")
        receiver.expect(transfer_id, offer.link_id, TARGET, 0, 1)
        self.sender.open(transfer_id, offer, 0)
        self.sender.push(transfer_id, SOURCE, 0, 1)
        self.sender.finish(transfer_id)
        wait_until(lambda: transfer_id in self._done)

    def close(self) -> None:
        self.sender.close()
        for receiver in self.receivers:
            receiver.close()


@pytest.fixture
def one_to_many() -> Iterator[OneToMany]:
    made = OneToMany()
    yield made
    made.close()


def test_the_link_that_was_used_least_recently_makes_room_at_the_sender(
    one_to_many: OneToMany,
) -> None:
    first, second, third = one_to_many.receivers
    for number, receiver in enumerate((first, second, first, third)):
        one_to_many.transfer(number, receiver)
    wait_until(lambda: second.num_links == 0)
    assert first.num_links == third.num_links == 1
    assert one_to_many.sender.counters().links_made == 3


def test_the_link_that_was_offered_least_recently_makes_room_at_the_receiver(
    make_memory_pair: MakePair,
) -> None:
    pair = make_memory_pair(receiver_limits=ReceiverLimits(timeout_seconds=5, max_links=2))
    first, second, again, _ = [pair.receiver.offer(peer).link_id for peer in "abac"]
    assert first == again
    assert pair.receiver.offer("a").link_id == first
    assert pair.receiver.offer("b").link_id != second


def test_a_prompt_goes_in_pieces_while_it_grows(make_memory_pair: MakePair) -> None:
    """When and how much is in test_outgoing.py; here the bounds are bytes."""
    limits = SenderLimits(
        timeout_seconds=5, segment_bytes=8 * BYTES_PER_TOKEN, piece_bytes=4 * BYTES_PER_TOKEN
    )
    pair = make_memory_pair(sender_limits=limits)
    transfer_id = pair.begin(SOURCE, TARGET, 0, 20)
    pair.sender.push(transfer_id, SOURCE, 0, 4)
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 4))
    pair.send_all(transfer_id, SOURCE, 4, 20)  # two full segments
    assert pair.next_completed() == (transfer_id, 20, None)
    assert pair.receiver.counters().segments == 3


def test_the_next_segment_is_gathered_while_one_is_on_the_wire(make_memory_pair: MakePair) -> None:
    plan = FaultPlan({1: Fault.HOLD})  # the first segment
    pair = make_memory_pair(plan)  # segments of four tokens
    gathered: list[tuple[int, int]] = []
    gather = pair.source.gather

    def noted(block_table: list[int], start: int, end: int, out: object) -> None:
        gather(block_table, start, end, out)  # type: ignore[arg-type]
        gathered.append((start, end))

    pair.source.gather = noted  # type: ignore[method-assign, assignment]
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 12)
    try:
        wait_until(lambda: gathered == [(0, 4), (4, 8)])
        assert pair.receiver.counters().segments == 0
    finally:
        plan.release()
    assert pair.next_completed() == (transfer_id, 12, None)
    assert pair.arrived(SOURCE, TARGET, 0, 12)
