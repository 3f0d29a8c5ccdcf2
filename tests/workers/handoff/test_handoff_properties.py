"""Random interleavings of every operation and fault.

Whatever happens: every transfer ends exactly once at each end, what is reported complete has
exactly the right bytes, and blocks of an ended transfer are never written again.
"""

import random
from collections import Counter
from dataclasses import dataclass

from handoff_pair import BLOCK_SIZE, Pair, handoff_threads, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_transport import Fault, FaultPlan, MemoryNetwork, MemoryTransport

from antiphon.errors import HandoffError, LinkBrokenError
from antiphon.workers.handoff.receiver import ReceiverLimits

NUM_TRANSFERS = 4
NUM_BLOCKS = 3  # of each transfer
END = NUM_BLOCKS * BLOCK_SIZE
QUICK_FAULTS = st.sampled_from([fault for fault in Fault if fault is not Fault.HOLD])


@dataclass
class _Transfer:
    index: int
    transfer_id: str
    start: int
    num_pushed: int
    cancelled: bool = False

    @property
    def table(self) -> list[int]:
        return list(range(self.index * NUM_BLOCKS, (self.index + 1) * NUM_BLOCKS))


class _Run:
    def __init__(self, faults: dict[int, Fault], rng: random.Random) -> None:
        network = MemoryNetwork()
        timeout = 0.1 if faults else 10.0  # without faults nothing has to time out
        self.pair = Pair(
            MemoryTransport(network, "sender:0", FaultPlan(faults)),
            MemoryTransport(network, "receiver:0"),
            receiver_limits=ReceiverLimits(timeout_seconds=timeout, io_timeout_seconds=0.1),
        )
        self.rng = rng
        self.transfers: list[_Transfer] = []

    def begin(self, index: int) -> None:
        start = self.rng.randrange(END)
        table = list(range(index * NUM_BLOCKS, (index + 1) * NUM_BLOCKS))
        try:
            transfer_id = self.pair.begin(table, table, start, END)
        except LinkBrokenError:  # the link broke between offer and expect
            return
        self.transfers.append(_Transfer(index, transfer_id, start, start))

    def step(self, transfer: _Transfer) -> bool:
        """Do something to a transfer; returns whether it wants more."""
        sender = self.pair.sender
        choice = self.rng.random()
        if choice < 0.1:
            sender.abort(transfer.transfer_id, "because")
            return False
        if choice < 0.2:
            transfer.cancelled |= self.pair.receiver.cancel(transfer.transfer_id)
            self.pair.target.poisoned |= set(transfer.table) if transfer.cancelled else set()
        if transfer.num_pushed == END or choice > 0.97:
            sender.finish(transfer.transfer_id)
            return False
        end = self.rng.randint(transfer.num_pushed + 1, END)
        sender.push(transfer.transfer_id, transfer.table, transfer.num_pushed, end)
        transfer.num_pushed = end
        return True

    def play(self) -> None:
        for index in range(NUM_TRANSFERS):
            self.begin(index)
        active = list(self.transfers)
        while active:
            transfer = self.rng.choice(active)
            if not self.step(transfer):
                active.remove(transfer)
        wait_until(lambda: self.pair.done.qsize() == len(self.transfers))
        wait_until(lambda: self.pair.receiver.num_pending == 0)
        self.pair.close()

    def check(self) -> None:
        done = Counter(report[0] for report in self.pair.done.queue)
        assert done == Counter(each.transfer_id for each in self.transfers)
        completed = {report[0]: report for report in self.pair.completed.queue}
        assert len(completed) == self.pair.completed.qsize()
        assert set(completed) == {t.transfer_id for t in self.transfers if not t.cancelled}
        assert self.pair.target.violations == []
        for transfer in self.transfers:
            if not transfer.cancelled:
                self.check_bytes(transfer, *completed[transfer.transfer_id][1:])

    def check_bytes(self, transfer: _Transfer, num_tokens: int, error: Exception | None) -> None:
        table, start = transfer.table, transfer.start
        assert error is None or isinstance(error, HandoffError)
        assert error is not None or num_tokens == END - start
        landed = start + num_tokens
        if num_tokens:
            assert self.pair.arrived(table, table, start, landed)
        for before, after in ((0, start), (landed, END)):
            assert not self.pair.target.tokens(table, before, after).any()


@settings(max_examples=150, deadline=None)
@given(
    faults=st.dictionaries(st.integers(0, 20), QUICK_FAULTS, max_size=2),
    seed=st.integers(0, 2**32),
)
def test_every_transfer_ends_once_and_right(faults, seed):
    run = _Run(faults, random.Random(seed))
    run.play()
    run.check()
    assert not handoff_threads()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_without_faults_everything_that_was_sent_arrives(seed):
    run = _Run({}, random.Random(seed))
    run.play()
    run.check()
    reports = {report[0]: report for report in run.pair.completed.queue}
    for transfer_id, error, *_ in run.pair.done.queue:
        transfer = next(t for t in run.transfers if t.transfer_id == transfer_id)
        if error is None and transfer.num_pushed == END and not transfer.cancelled:
            assert reports[transfer_id][2] is None
