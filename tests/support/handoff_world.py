"""Two senders and a receiver on stepped threads, watched from both ends of every transfer.

Blocks are few and change hands all the time; ``owned_blocks`` says when an access is wrong. Links
are few as well: those of the two senders, of before and now, have to make room for each other.
"""

import contextlib
import uuid
from collections import Counter

from handoff_pair import BLOCK_SIZE, BYTES_PER_TOKEN, WIRE
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport
from owned_blocks import NUM_SOURCE_BLOCKS, SourceStore, TargetStore, Transfer
from turns import Turns

from antiphon.errors import AntiphonError, HandoffError
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits

NUM_SENDERS = 2
MAX_BLOCKS = 3  # of a transfer
SETTLE_SECONDS = 100.0  # on the stepped clock; far beyond every time-out below
RECEIVER_LIMITS = ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2, max_links=2)
SENDER_LIMITS = SenderLimits(
    timeout_seconds=3,
    max_links=2,
    segment_bytes=3 * BYTES_PER_TOKEN,
    piece_bytes=2 * BYTES_PER_TOKEN,
)


class _Faults(dict[int, Fault]):
    """Faults by the number of a send, counted over all links."""

    num_sends = -1

    def get(self, _number: int, default: Fault | None = None) -> Fault | None:  # type: ignore[override]
        self.num_sends += 1
        return super().get(self.num_sends, default)


class _Transport(MemoryTransport):
    """Remembers the links that it made, so that they can be broken."""

    links: list

    def connect(self, address: str, link_id: str, timeout_seconds: float) -> object:
        link = super().connect(address, link_id, timeout_seconds)
        self.links.append(link)
        return link


class _Peer:
    """A sender that lives at an address, and its transport."""

    def __init__(self, name: str, transport: _Transport, sender: HandoffSender) -> None:
        self.name = name
        self.transport = transport
        self.sender = sender


class World:
    """What a test does to the ends; every method is something that may happen at any time.

    A ``number`` says which of the senders, or of their links.
    """

    def __init__(self, turns: Turns, faults: dict[int, Fault]) -> None:
        self.turns = turns
        self.source = SourceStore(turns)
        self.target = TargetStore(turns)
        self.transfers: list[Transfer] = []
        self.problems: list[str] = []
        self._network = MemoryNetwork()
        self._plan = FaultPlan(_Faults(faults))
        self._num_starts = 0
        self.peers = [self._start_sender(number) for number in range(NUM_SENDERS)]
        self.receiver = self._start_receiver()

    @property
    def open_transfers(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if not transfer.is_over]

    def pick(self, number: int) -> Transfer | None:
        """The transfer that is being copied right now, or any open one."""
        open_now = self.open_transfers
        for each in open_now:
            first_blocks = each.target_table[0], each.source_table[0]
            if first_blocks[0] == self.target.writing_for or (
                first_blocks[1] == self.source.reading_for
            ):
                return each
        return open_now[number % len(open_now)] if open_now else None

    def open(self, number: int, num_blocks: int, start: int) -> Transfer | None:
        """Begin a transfer of that many blocks; None if there is no room, or no link."""
        peer = self._peer(number)
        free = self.target.free
        if num_blocks > len(free) or num_blocks > len(self.source.free):
            return None
        source_table, target_table = self.source.take(num_blocks), free[:num_blocks]
        end = num_blocks * BLOCK_SIZE
        expected = self.source.tokens(source_table, 0, end).clone()
        transfer = Transfer(
            uuid.UUID(int=len(self.transfers)).hex, source_table, target_table, expected,
            start % end, end, peer.sender, start % end,
        )  # fmt: skip
        for block in target_table:
            self.target.owners[block] = transfer
        self.target.slots[self.target.indices(target_table, 0, end)] = 0
        self.transfers.append(transfer)
        return transfer if self._begin(transfer, peer) else None

    def prewarm(self, number: int) -> None:
        """Make a link before a transfer wants it."""
        peer = self._peer(number)
        with contextlib.suppress(AntiphonError):  # it is a favour
            if offer := self.receiver.prewarm(peer.name):
                self.turns.pause()  # the offer travels
                peer.sender.prewarm(offer)

    def push(self, transfer: Transfer, num_tokens: int) -> None:
        end = min(transfer.end, transfer.num_pushed + num_tokens)
        if not transfer.is_finished:
            start, transfer.num_pushed = transfer.num_pushed, end
            table = transfer.source_table
            transfer.sender.push(transfer.transfer_id, table, start, end)

    def finish(self, transfer: Transfer) -> None:
        transfer.is_finished = True
        transfer.sender.finish(transfer.transfer_id)

    def abort(self, transfer: Transfer) -> None:
        transfer.is_finished = True
        transfer.sender.abort(transfer.transfer_id, "because")

    def cancel(self, transfer: Transfer) -> None:
        if self.receiver.cancel(transfer.transfer_id):
            transfer.is_cancelled = True
            self._release(transfer)

    def retire(self, number: int) -> None:
        """As after a stall."""
        link = self.receiver._links.current(self._peer(number).name)
        if link is not None:
            self.receiver.retire(link.link_id)

    def broke(self, number: int) -> None:
        """As when the sender says so; transfers on the link are left to their time-out."""
        link = self.receiver._links.current(self._peer(number).name)
        if link is not None:
            self.receiver.broke(link.link_id, "because")

    def receiver_leaves(self, number: int) -> None:
        """Its last session with a sender is lost."""
        self.receiver.leave(self._peer(number).name)

    def sender_leaves(self, number: int) -> None:
        """Its last session with the receiver is lost."""
        self._peer(number).sender.leave(self.receiver._endpoint.incarnation)

    def break_link(self, number: int) -> None:
        links = [link for peer in self.peers for link in peer.transport.links]
        if links:
            links[number % len(links)].close()

    def restart_sender(self, number: int) -> None:
        """As a killed process: its links break without a word, and a stranger takes its place."""
        number %= NUM_SENDERS
        self._sever(self.peers[number])
        self.peers[number].sender.close()
        self.peers[number] = self._start_sender(number)

    def restart_receiver(self) -> None:
        """The same, at the same address."""
        for peer in self.peers:
            self._sever(peer)
        self.receiver.close()
        self.receiver = self._start_receiver()

    def settle(self) -> None:
        """Let everything end, close both ends, and check what must hold for every run."""
        for transfer in self.open_transfers:
            self.push(transfer, transfer.end)
            self.finish(transfer)
        self.turns.wait(lambda: not self.open_transfers, SETTLE_SECONDS)
        assert not self.open_transfers, f"never ended: {self.open_transfers}"
        links = self.receiver._links.given_up
        assert all(link.transfers or link.is_closing for link in links), "nobody will close a link"
        for peer in self.peers:
            kept = Counter(link.offer.receiver_incarnation for link in peer.sender._links.values())
            assert max(kept.values(), default=0) <= 1, "nobody will close a link that was left"
            peer.sender.close()
        self.receiver.close()
        problems = self.problems + self.source.problems + self.target.problems
        assert not problems, problems
        assert not self.turns.errors, self.turns.errors
        # A link's thread that had said goodbye before ``close`` is not waited for there.
        assert self.turns.wait(lambda: not self.turns.running, SETTLE_SECONDS), self.turns.running
        assert self.receiver.num_pending == sum(peer.sender.num_links for peer in self.peers) == 0
        assert not self.target.owners
        assert len(self.source.free) == NUM_SOURCE_BLOCKS

    def _peer(self, number: int) -> _Peer:
        return self.peers[number % NUM_SENDERS]

    def _start_sender(self, number: int) -> _Peer:
        self._num_starts += 1
        transport = _Transport(self._network, f"sender:{number}", self._plan)
        transport.links = []
        name = f"prefill-{self._num_starts}"
        endpoint = Endpoint(transport, self.source, name, WIRE)
        return _Peer(name, transport, HandoffSender(endpoint, SENDER_LIMITS, self._on_done))

    def _start_receiver(self) -> HandoffReceiver:
        self._num_starts += 1
        transport = MemoryTransport(self._network, "receiver:0")
        endpoint = Endpoint(transport, self.target, f"decode-{self._num_starts}", WIRE)
        return HandoffReceiver(endpoint, RECEIVER_LIMITS, self._on_complete)

    def _begin(self, transfer: Transfer, peer: _Peer) -> bool:
        table = transfer.target_table
        try:
            offer = self.receiver.offer(peer.name)
            self.receiver.expect(
                transfer.transfer_id, offer.link_id, table, transfer.start, transfer.end
            )
            self.turns.pause()  # the request for it travels
            peer.sender.open(transfer.transfer_id, offer, transfer.start)
        except AntiphonError:  # busy, or the link broke in between; nothing has begun
            self.receiver.cancel(transfer.transfer_id)
            self.transfers.remove(transfer)
            self._release(transfer)
            self.source.give_back(transfer.source_table)
            return False
        return True

    @staticmethod
    def _sever(peer: _Peer) -> None:
        for link in peer.transport.links:
            link.close()

    def _find(self, transfer_id: str) -> Transfer | None:
        found = [each for each in self.transfers if each.transfer_id == transfer_id]
        return found[0] if found else None

    def _on_done(self, transfer_id: str, error: HandoffError | None, *_: object) -> None:
        transfer = self._find(transfer_id)
        assert transfer is not None
        transfer.num_done += 1
        self._expect(transfer.num_done == 1, "a transfer was done twice")
        self.source.give_back(transfer.source_table)

    def _on_complete(self, transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        transfer = self._find(transfer_id)
        if transfer is None:
            return  # it had not begun at the other end; its blocks are free already
        transfer.num_completed += 1
        transfer.error = error
        once = transfer.num_completed == 1 and not transfer.is_cancelled
        self._expect(once, "a transfer ended twice")
        self._expect(error is not None or num_tokens == transfer.end - transfer.start, "a gap")
        got = self.target.tokens(transfer.target_table, 0, transfer.end)
        landed = transfer.start + num_tokens
        right = got[transfer.start : landed].equal(transfer.expected[transfer.start : landed])
        self._expect(right, "reported tokens are wrong")
        beyond = got[: transfer.start].any() or got[landed:].any()
        self._expect(not beyond, "more was written than was reported")
        self._release(transfer)

    def _release(self, transfer: Transfer) -> None:
        for block in transfer.target_table:
            if self.target.owners.get(block) is transfer:
                del self.target.owners[block]

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)
