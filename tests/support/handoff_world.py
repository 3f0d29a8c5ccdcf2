"""A sender and a receiver on stepped threads, watched from both ends of every transfer.

Blocks are few and change hands all the time. A target block belongs to a transfer from ``open``
until the receiver has reported its end or ``cancel`` has returned. A write is only right if it
brings what the owner of the block is to get there. A source block is overwritten the moment that
the sender reports the transfer's end, and must not be read after that.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from handoff_pair import BLOCK_SIZE, BYTES_PER_TOKEN, WIRE, FakeStore
from torch import Tensor
from turns import Turns

from antiphon.errors import AntiphonError, HandoffError
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.memory import Fault, FaultPlan, MemoryNetwork, MemoryTransport
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits

NUM_TARGET_BLOCKS = 7
NUM_SOURCE_BLOCKS = 24
MAX_BLOCKS = 3  # of a transfer
SETTLE_SECONDS = 100.0  # on the stepped clock; far beyond every time-out below
RECEIVER_LIMITS = ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2, max_pending=4)
SENDER_LIMITS = SenderLimits(timeout_seconds=3, segment_bytes=3 * BYTES_PER_TOKEN)


@dataclass(eq=False)
class Transfer:
    """One transfer as both ends have reported it."""

    transfer_id: str
    source_table: list[int]
    target_table: list[int]
    expected: Tensor  # [tokens of the whole table, bytes]
    start: int
    end: int
    sender: HandoffSender
    num_pushed: int
    error: Exception | None = None  # as the receiver reported it
    num_completed: int = 0
    num_done: int = 0
    is_cancelled: bool = False
    is_finished: bool = False

    @property
    def is_over(self) -> bool:
        return self.num_done > 0 and (self.num_completed > 0 or self.is_cancelled)


class SourceStore(FakeStore):
    """Blocks that hold something only while a transfer may read them."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(NUM_SOURCE_BLOCKS)
        self.free = list(range(NUM_SOURCE_BLOCKS))
        self.problems: list[str] = []
        self._turns = turns
        self._generator = torch.Generator().manual_seed(7)

    def take(self, num_blocks: int) -> list[int]:
        table = [self.free.pop(0) for _ in range(num_blocks)]
        for block in table:
            rows = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            self.slots[rows].random_(1, 256, generator=self._generator)
        return table

    def give_back(self, table: list[int]) -> None:
        self.slots[self.indices(table, 0, len(table) * BLOCK_SIZE)] = 0
        self.free += table

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        used = {block_table[token // BLOCK_SIZE] for token in range(start, end)}
        self._turns.pause()
        if used & set(self.free):
            self.problems.append(f"tokens [{start}, {end}) were read after their transfer's end")
        super().gather(block_table, start, end, out)


class TargetStore(FakeStore):
    """Blocks with an owner each, and no right to write for anybody else."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(NUM_TARGET_BLOCKS)
        self.owners: dict[int, Transfer] = {}
        self.problems: list[str] = []
        self._turns = turns

    @property
    def free(self) -> list[int]:
        return [block for block in range(NUM_TARGET_BLOCKS) if block not in self.owners]

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        rows = segment.view(end - start, -1)
        for token in range(start, end):  # one at a time, and anybody may get in between
            self._turns.pause()
            block, offset = block_table[token // BLOCK_SIZE], token % BLOCK_SIZE
            self._check(block, offset, rows[token - start])
            self.slots[block * BLOCK_SIZE + offset] = rows[token - start]

    def _check(self, block: int, offset: int, row: Tensor) -> None:
        owner = self.owners.get(block)
        if owner is None:
            self.problems.append(f"block {block} was written and belongs to nobody")
            return
        token = owner.target_table.index(block) * BLOCK_SIZE + offset
        if not owner.start <= token < owner.end or not owner.expected[token].equal(row):
            self.problems.append(f"token {token} of a transfer got bytes of something else")


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

    def open(self, num_blocks: int, start: int) -> None:
        free = self.target.free
        if num_blocks > len(free) or num_blocks > len(self.source.free):
            return
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
        self._begin(transfer)

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
            self.finish(transfer)
        self.turns.wait(lambda: not self.open_transfers, SETTLE_SECONDS)
        assert not self.open_transfers, f"never ended: {self.open_transfers}"
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

    def _begin(self, transfer: Transfer) -> None:
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
