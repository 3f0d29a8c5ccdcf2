"""A sender and a receiver on stepped threads, watched from both ends of every transfer.

Blocks are few and change hands all the time; ``owned_blocks`` says when an access is wrong.
"""

import contextlib
import uuid

from handoff_pair import BLOCK_SIZE, BYTES_PER_TOKEN, WIRE
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport
from owned_blocks import NUM_SOURCE_BLOCKS, SourceStore, TargetStore, Transfer
from turns import Turns

from antiphon.errors import AntiphonError, HandoffError
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits

MAX_BLOCKS = 3  # of a transfer
SETTLE_SECONDS = 100.0  # on the stepped clock; far beyond every time-out below
RECEIVER_LIMITS = ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2)
SENDER_LIMITS = SenderLimits(
    timeout_seconds=3, segment_bytes=3 * BYTES_PER_TOKEN, piece_bytes=2 * BYTES_PER_TOKEN
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


class World:
    """What a test does to the two ends; every method is something that may happen at any time."""

    def __init__(self, turns: Turns, faults: dict[int, Fault]) -> None:
        self.turns = turns
        self.source = SourceStore(turns)
        self.target = TargetStore(turns)
        self.transfers: list[Transfer] = []
        self.problems: list[str] = []
        self._network = MemoryNetwork()
        self._plan = FaultPlan(_Faults(faults))
        self._num_starts = 0
        self.sender = self._start_sender()
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

    def open(self, num_blocks: int, start: int) -> Transfer | None:
        """Begin a transfer of that many blocks; None if there is no room, or no link."""
        free = self.target.free
        if num_blocks > len(free) or num_blocks > len(self.source.free):
            return None
        source_table, target_table = self.source.take(num_blocks), free[:num_blocks]
        end = num_blocks * BLOCK_SIZE
        expected = self.source.tokens(source_table, 0, end).clone()
        transfer = Transfer(
            uuid.UUID(int=len(self.transfers)).hex, source_table, target_table, expected,
            start % end, end, self.sender, start % end,
        )  # fmt: skip
        for block in target_table:
            self.target.owners[block] = transfer
        self.target.slots[self.target.indices(target_table, 0, end)] = 0
        self.transfers.append(transfer)
        return transfer if self._begin(transfer) else None

    def prewarm(self) -> None:
        """Make a link before a transfer wants it."""
        with contextlib.suppress(AntiphonError):  # it is a favour
            if offer := self.receiver.prewarm(self._sender_name):
                self.turns.pause()  # the offer travels
                self.sender.prewarm(offer)

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

    def retire(self) -> None:
        """As after a stall, or when the sender says that the link broke."""
        link = self.receiver._links.current(self._sender_name)
        if link is not None:
            self.receiver.retire(link.link_id)

    def break_link(self, number: int) -> None:
        links = self.sender_transport.links
        if links:
            links[number % len(links)].close()

    def restart_sender(self) -> None:
        """As a killed process: its links break without a word, and a stranger takes its place."""
        self._sever()
        self.sender.close()
        self.sender = self._start_sender()

    def restart_receiver(self) -> None:
        """The same, at the same address."""
        self._sever()
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
        self.sender.close()
        self.receiver.close()
        problems = self.problems + self.source.problems + self.target.problems
        assert not problems, problems
        assert not self.turns.errors, self.turns.errors
        # A link's thread that had said goodbye before ``close`` is not waited for there.
        assert self.turns.wait(lambda: not self.turns.running, SETTLE_SECONDS), self.turns.running
        assert self.sender.num_links == self.receiver.num_pending == 0
        assert not self.target.owners
        assert len(self.source.free) == NUM_SOURCE_BLOCKS

    def _start_sender(self) -> HandoffSender:
        self._num_starts += 1
        self.sender_transport = _Transport(self._network, "sender:0", self._plan)
        self.sender_transport.links = []
        name = f"prefill-{self._num_starts}"
        self._sender_name = name
        endpoint = Endpoint(self.sender_transport, self.source, name, WIRE)
        return HandoffSender(endpoint, SENDER_LIMITS, self._on_done)

    def _start_receiver(self) -> HandoffReceiver:
        self._num_starts += 1
        transport = MemoryTransport(self._network, "receiver:0")
        endpoint = Endpoint(transport, self.target, f"decode-{self._num_starts}", WIRE)
        return HandoffReceiver(endpoint, RECEIVER_LIMITS, self._on_complete)

    def _begin(self, transfer: Transfer) -> bool:
        table = transfer.target_table
        try:
            offer = self.receiver.offer(self._sender_name)
            self.receiver.expect(
                transfer.transfer_id, offer.link_id, table, transfer.start, transfer.end
            )
            self.turns.pause()  # the request for it travels
            self.sender.open(transfer.transfer_id, offer, transfer.start)
        except AntiphonError:  # busy, or the link broke in between; nothing has begun
            self.receiver.cancel(transfer.transfer_id)
            self.transfers.remove(transfer)
            self._release(transfer)
            self.source.give_back(transfer.source_table)
            return False
        return True

    def _sever(self) -> None:
        for link in self.sender_transport.links:
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
