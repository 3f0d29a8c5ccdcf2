"""A small KV store, and two ends of a hand-off joined by any transport."""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.handoff.wire import WireFormat

BLOCK_SIZE = 4
BYTES_PER_TOKEN = 24
WIRE = WireFormat("model-a", ((1, 3, 3),), "float32")
WAIT_SECONDS = 10.0


class FakeStore:
    """Slots of bytes; refuses to write to blocks that were taken away from a transfer."""

    def __init__(self, num_blocks: int = 64, bytes_per_token: int = BYTES_PER_TOKEN) -> None:
        self.num_bytes_per_token = bytes_per_token
        self.device = torch.device("cpu")
        self.block_size = BLOCK_SIZE
        self.slots = torch.zeros(num_blocks * BLOCK_SIZE, bytes_per_token, dtype=torch.uint8)
        self.poisoned: set[int] = set()
        self.violations: list[int] = []
        self.scatter_gate: threading.Event | None = None
        self.scatter_began = threading.Event()
        self.fail_with: Exception | None = None

    def fill_random(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.slots.random_(1, 256, generator=generator)

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        out.copy_(self.slots[self.indices(block_table, start, end)].view(-1))

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        self.scatter_began.set()
        if self.scatter_gate is not None:
            assert self.scatter_gate.wait(WAIT_SECONDS)
        indices = self.indices(block_table, start, end)
        blocks = {index // BLOCK_SIZE for index in indices.tolist()}
        self.violations += sorted(blocks & self.poisoned)
        self.slots[indices] = segment.view(end - start, -1)

    def tokens(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        return self.slots[self.indices(block_table, start, end)]

    @staticmethod
    def indices(block_table: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return torch.tensor(block_table)[positions // BLOCK_SIZE] * BLOCK_SIZE + (
            positions % BLOCK_SIZE
        )


class Pair:
    """A sender, a receiver, and what they reported."""

    def __init__(
        self,
        sender_transport: Transport,
        receiver_transport: Transport,
        sender_wire: WireFormat = WIRE,
        receiver_limits: ReceiverLimits | None = None,
        sender_limits: SenderLimits | None = None,
    ) -> None:
        self.source = FakeStore()
        self.source.fill_random(7)
        self.target = FakeStore()
        self.done: queue.Queue[tuple[str, Exception | None, int, float]] = queue.Queue()
        self.completed: queue.Queue[tuple[str, int, Exception | None]] = queue.Queue()
        self.sender = HandoffSender(
            Endpoint(sender_transport, self.source, "prefill-1", sender_wire),
            sender_limits
            or SenderLimits(timeout_seconds=5, segment_bytes=4 * BYTES_PER_TOKEN, piece_bytes=0),
            lambda *report: self.done.put(report),
        )
        self.receiver = HandoffReceiver(
            Endpoint(receiver_transport, self.target, "decode-1", WIRE),
            receiver_limits or ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2),
            lambda *report: self.completed.put(report),
        )

    def begin(
        self, source: list[int], target: list[int], start: int, end: int, peer: str = "prefill-1"
    ) -> str:
        """Expect and open a transfer; nothing is sent yet."""
        transfer_id = uuid.uuid4().hex
        offer = self.receiver.offer(peer)
        self.receiver.expect(transfer_id, offer.link_id, target, start, end)
        self.sender.open(transfer_id, offer, start)
        return transfer_id

    def send_all(self, transfer_id: str, source: list[int], start: int, end: int) -> None:
        self.sender.push(transfer_id, source, start, end)
        self.sender.finish(transfer_id)

    def transfer(self, source: list[int], target: list[int], start: int, end: int) -> str:
        transfer_id = self.begin(source, target, start, end)
        self.send_all(transfer_id, source, start, end)
        return transfer_id

    def next_completed(self) -> tuple[str, int, Exception | None]:
        return self.completed.get(timeout=WAIT_SECONDS)

    def next_done(self) -> tuple[str, Exception | None, int, float]:
        return self.done.get(timeout=WAIT_SECONDS)

    def arrived(self, source: list[int], target: list[int], start: int, end: int) -> bool:
        expected = self.source.tokens(source, start, end)
        return torch.equal(expected, self.target.tokens(target, start, end))

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def wait_until(condition: Callable[[], bool], wait_seconds: float = WAIT_SECONDS) -> None:
    """Wait for a state that nothing announces."""
    deadline = time.monotonic() + wait_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.001)


def handoff_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("handoff")}
