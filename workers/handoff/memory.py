"""Links inside one process, for tests: they lose, repeat, reorder, corrupt and break on demand.

Faults strike whole sends of the connecting end, that is a header with its payload, counted from
0 on each link; send 0 is the handshake's.
"""

import enum
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from antiphon.errors import LinkBrokenError

_MAX_QUEUED_SENDS = 4  # then a send waits for the receiver, as it does over a network


class Fault(enum.Enum):
    """What happens to a send."""

    DROP = enum.auto()
    DUPLICATE = enum.auto()
    SWAP = enum.auto()  # comes after the next send; lost if there is none
    CORRUPT_HEADER = enum.auto()
    CORRUPT_PAYLOAD = enum.auto()
    HOLD = enum.auto()  # until ``FaultPlan.release``
    BREAK_BEFORE = enum.auto()  # the link dies instead of the send
    BREAK_AFTER = enum.auto()  # the link dies once the send was queued


@dataclass(slots=True, eq=False)
class FaultPlan:
    """Which sends of each link go wrong, by their number."""

    faults: Mapping[int, Fault] = field(default_factory=dict)
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let held sends through."""
        self._released.set()

    def wait_released(self, timeout_seconds: float) -> None:
        """Wait for ``release``.

        Raises:
            LinkBrokenError: It did not come in time.
        """
        if not self._released.wait(timeout_seconds):
            raise LinkBrokenError("a held send was never released")


class _Wire:
    """Both directions of one link; broken as a whole."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.broken = False
        self.queues: tuple[deque[list[Tensor]], deque[list[Tensor]]] = (deque(), deque())

    def put(self, end: int, tensors: list[Tensor], timeout_seconds: float) -> None:
        queue = self.queues[end]
        with self.changed:
            self._wait(lambda: len(queue) < _MAX_QUEUED_SENDS, timeout_seconds)
            queue.append(list(tensors))
            self.changed.notify_all()

    def take(self, end: int, timeout_seconds: float | None) -> Tensor:
        queue = self.queues[end]
        with self.changed:
            self._wait(lambda: bool(queue), timeout_seconds)
            tensor = queue[0].pop(0)
            if not queue[0]:
                queue.popleft()
            self.changed.notify_all()
            return tensor

    def break_(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout_seconds: float | None) -> None:
        in_time = self.changed.wait_for(lambda: self.broken or ready(), timeout_seconds)
        self.broken = self.broken or not in_time
        if self.broken:
            self.changed.notify_all()
            raise LinkBrokenError("the link broke" if in_time else "the peer did not act in time")


class MemoryLink:
    """One end of a link; end 0 accepted, end 1 connected."""

    def __init__(self, wire: _Wire, end: int, plan: FaultPlan) -> None:
        self._wire = wire
        self._end = end
        self._plan = plan
        self._num_sends = 0
        self._swapped: list[Tensor] | None = None

    def send(self, tensors: Sequence[Tensor], timeout_seconds: float) -> None:
        """See ``Link.send``."""
        fault = self._plan.faults.get(self._num_sends)
        self._num_sends += 1
        unit = [tensor.clone() for tensor in tensors]
        if fault is Fault.SWAP:
            self._swapped = unit
            return
        if fault is Fault.BREAK_BEFORE:
            self.close()
        elif fault is Fault.CORRUPT_HEADER:
            unit[0][17] ^= 0x40
        elif fault is Fault.CORRUPT_PAYLOAD:
            unit[-1][-1] ^= 0x01
        elif fault is Fault.HOLD:
            self._plan.wait_released(timeout_seconds)
        if fault is not Fault.DROP:
            self._wire.put(self._end, unit, timeout_seconds)
        if fault is Fault.DUPLICATE:
            self._wire.put(self._end, unit, timeout_seconds)
        elif fault is Fault.BREAK_AFTER:
            self.close()
        if self._swapped is not None:
            swapped, self._swapped = self._swapped, None
            self._wire.put(self._end, swapped, timeout_seconds)

    def recv(self, tensor: Tensor, timeout_seconds: float | None) -> None:
        """See ``Link.recv``."""
        received = self._wire.take(1 - self._end, timeout_seconds)
        if received.numel() != tensor.numel():
            self.close()
            raise LinkBrokenError(
                f"{received.numel()} bytes arrived where {tensor.numel()} were expected"
            )
        tensor.copy_(received)

    def close(self) -> None:
        """See ``Link.close``."""
        self._wire.break_()


class MemoryNetwork:
    """The addresses that transports of one test share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.transports: dict[str, MemoryTransport] = {}


class MemoryTransport:
    """Makes links within a network.

    Args:
        network: Shared with the peers.
        address: Unique within the network.
        plan: Faults of every link that this transport connects.
    """

    name = "memory"

    def __init__(self, network: MemoryNetwork, address: str, plan: FaultPlan | None = None) -> None:
        self._network = network
        self._address = address
        self._plan = plan or FaultPlan()
        self._waiting: dict[str, _Wire] = {}  # connected, not accepted yet
        self._used: set[str] = set()
        self._refused: set[str] = set()
        self._closed = False
        network.transports[address] = self

    @property
    def address(self) -> str:
        """See ``Transport.address``."""
        return self._address

    def accept(self, link_id: str, timeout_seconds: float) -> MemoryLink:
        """See ``Transport.accept``."""
        changed = self._network.changed
        with changed:
            arrived = changed.wait_for(
                lambda: link_id in self._waiting or self._closed or link_id in self._refused,
                timeout_seconds,
            )
            if not arrived:
                raise TimeoutError(f"nobody connected in {timeout_seconds} s")
            if self._closed or link_id in self._refused:
                raise LinkBrokenError("the link was refused at this end")
            wire = self._waiting.pop(link_id)
            changed.notify_all()
            return MemoryLink(wire, 0, FaultPlan())

    def connect(self, address: str, link_id: str, timeout_seconds: float) -> MemoryLink:
        """See ``Transport.connect``."""
        changed = self._network.changed
        with changed:
            peer = self._network.transports.get(address)
            if peer is None or peer._closed:
                raise LinkBrokenError(f"nobody listens at {address}")
            if link_id in peer._used | peer._refused:
                raise LinkBrokenError(f"the worker at {address} refuses the link")
            peer._used.add(link_id)
            peer._waiting[link_id] = wire = _Wire()
            changed.notify_all()
            accepted = changed.wait_for(lambda: peer._gone(link_id), timeout_seconds)
            if not accepted or link_id in peer._waiting:
                raise LinkBrokenError(f"the worker at {address} did not accept the link")
            return MemoryLink(wire, 1, self._plan)

    def refuse(self, link_id: str) -> None:
        """See ``Transport.refuse``."""
        with self._network.changed:
            self._refused.add(link_id)
            self._network.changed.notify_all()

    def close(self) -> None:
        """See ``Transport.close``."""
        with self._network.changed:
            self._closed = True
            self._network.changed.notify_all()

    def _gone(self, link_id: str) -> bool:
        return link_id not in self._waiting or link_id in self._refused or self._closed
