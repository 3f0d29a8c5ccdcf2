"""Links inside one process: they lose, repeat, reorder, corrupt and break on demand.

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
from antiphon.workers.handoff.transport import Link, Place

_MAX_QUEUED_SENDS = 2  # then a send waits for the receiver, as it does over a network


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

    def wait_released(self, timeout_seconds: float | None) -> None:
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
        self._closed_by: int | None = None
        self._ways = (_Way(), _Way())

    def put(self, end: int, tensors: list[Tensor]) -> int:
        """Send a unit; returns its number, for ``wait_for_room``."""
        way = self._ways[end]
        with self.changed:
            self._check()
            way.units.append(list(tensors))
            way.num_put += 1
            self._match(way)
            return way.num_put

    def wait_for_room(self, end: int, number: int, timeout_seconds: float | None) -> None:
        """Wait until a unit is among the few that a network would have taken already."""
        way = self._ways[end]
        with self.changed:
            self._wait(
                lambda: number - (way.num_put - len(way.units)) <= _MAX_QUEUED_SENDS,
                timeout_seconds,
            )

    def post(self, end: int, receive: "MemoryReceive") -> None:
        with self.changed:
            # As over TCP: what an end has sent before it closed the link still comes.
            if not (self._closed_by == end and self._ways[end].units):
                self._check()
            self._ways[end].posted.append(receive)
            self._match(self._ways[end])

    def wait_for(self, receive: "MemoryReceive", timeout_seconds: float | None) -> None:
        with self.changed:
            self.changed.wait_for(lambda: receive.is_done or self.broken, timeout_seconds)
            if not receive.is_done:  # else it came before the link broke
                self._wait(lambda: False, 0)

    def _match(self, way: "_Way") -> None:
        while way.units and way.posted:
            sent, receive = way.units[0].pop(0), way.posted.popleft()
            if not way.units[0]:
                way.units.popleft()
            if sent.numel() > receive.tensor.numel():
                self.broken = True
            else:
                receive.tensor[: sent.numel()].copy_(sent)
                receive.is_done = True
        self.changed.notify_all()

    def _check(self) -> None:
        if self.broken:
            raise LinkBrokenError("the link broke")

    def close(self, end: int) -> None:
        with self.changed:
            if not self.broken:
                self.broken, self._closed_by = True, end
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout_seconds: float | None) -> None:
        in_time = self.changed.wait_for(lambda: self.broken or ready(), timeout_seconds)
        self.broken = self.broken or not in_time
        if self.broken:
            self.changed.notify_all()
            raise LinkBrokenError("the link broke" if in_time else "the peer did not act in time")


class _Way:
    """One direction."""

    def __init__(self) -> None:
        self.units: deque[list[Tensor]] = deque()  # sent, not received
        self.posted: deque[MemoryReceive] = deque()  # waiting for what is sent
        self.num_put = 0


class MemoryLink(Link):
    """One end of a link; end 0 accepted, end 1 connected."""

    def __init__(self, wire: _Wire, end: int, plan: FaultPlan) -> None:
        self.wire = wire
        self.end = end
        self._plan = plan
        self._num_sends = 0
        self._held: deque[MemorySend] = deque()
        self._swapped: list[Tensor] | None = None

    def start_send(self, tensors: Sequence[Tensor]) -> "MemorySend":
        """See ``Link.start_send``."""
        send = MemorySend(self, tensors, self._plan.faults.get(self._num_sends))
        self._num_sends += 1
        if self._held or send.fault is Fault.HOLD:
            self._held.append(send)
        else:
            self._put(send)
        return send

    def start_recv(self, tensor: Tensor) -> "MemoryReceive":
        """See ``Link.start_recv``."""
        receive = MemoryReceive(self.wire, tensor)
        self.wire.post(1 - self.end, receive)
        return receive

    def close(self) -> None:
        """See ``Link.close``."""
        self.wire.close(self.end)

    def release(self, send: "MemorySend", timeout_seconds: float | None) -> None:
        """Put what is held up to and with this send, once the plan lets it through."""
        while send in self._held:
            if self._held[0].fault is Fault.HOLD:
                self._plan.wait_released(timeout_seconds)
            self._put(self._held.popleft())

    def _put(self, send: "MemorySend") -> None:
        if send.fault is Fault.SWAP:
            self._swapped = send.unit
            return
        if send.fault is Fault.BREAK_BEFORE:
            self.close()
        elif send.fault is Fault.CORRUPT_HEADER:
            send.unit[0][17] ^= 0x40
        elif send.fault is Fault.CORRUPT_PAYLOAD:
            send.unit[-1][-1] ^= 0x01
        if send.fault is not Fault.DROP:
            send.number = self.wire.put(self.end, send.unit)
        if send.fault is Fault.DUPLICATE:
            send.number = self.wire.put(self.end, send.unit)
        elif send.fault is Fault.BREAK_AFTER:
            self.close()
        if self._swapped is not None:
            swapped, self._swapped = self._swapped, None
            self.wire.put(self.end, swapped)


class MemorySend:
    """A send; what is sent was copied when it was started."""

    def __init__(self, link: MemoryLink, tensors: Sequence[Tensor], fault: Fault | None) -> None:
        self.unit = [tensor.clone() for tensor in tensors]
        self.fault = fault
        self.number = 0
        self._link = link

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        self._link.release(self, timeout_seconds)
        if self.fault not in (Fault.DROP, Fault.SWAP):
            self._link.wire.wait_for_room(self._link.end, self.number, timeout_seconds)


class MemoryReceive:
    """A receive; filled when something is sent, or at once."""

    def __init__(self, wire: _Wire, tensor: Tensor) -> None:
        self.tensor = tensor
        self.is_done = False
        self._wire = wire

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        self._wire.wait_for(self, timeout_seconds)


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

    place = Place.HOST

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

    def accept(
        self, link_id: str, timeout_seconds: float, set_up_seconds: float | None = None
    ) -> MemoryLink:
        """See ``Transport.accept``; set-up takes no time."""
        changed = self._network.changed
        with changed:
            if not changed.wait_for(
                lambda: link_id in self._waiting or self._closed or link_id in self._refused,
                timeout_seconds,
            ):
                raise TimeoutError(f"nobody connected in {timeout_seconds} s")
            if self._closed or link_id in self._refused:
                raise LinkBrokenError("the link was refused at this end")
            changed.notify_all()
            return MemoryLink(self._waiting.pop(link_id), 0, FaultPlan())

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
