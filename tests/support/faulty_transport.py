"""A transport around another, through which a test sees every message and decides its fate.

It reads the headers that pass, so faults are placed by what a message is and not by its number.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fault_cells import Step
from torch import Tensor

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.segment import HEADER_BYTES, Header, Kind, as_bytes
from antiphon.workers.handoff.transport import Link, Pending, Transport

Message = Sequence[Tensor]
Send = Callable[[Message], None]
# (the message's step, its link, the message, how to send): sends it, another, both or nothing.
OnSend = Callable[[Step, "FaultyLink", Message, Send], None]
OnReceived = Callable[["FaultyLink"], None]  # something was read; the reader goes on on return


def _send_as_it_is(step: Step, link: "FaultyLink", message: Message, send: Send) -> None:
    send(message)


class _Sends:
    """What became of one send: any number of them."""

    def __init__(self, started: list[Pending]) -> None:
        self._started = started

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        for pending in self._started:
            pending.wait(timeout_seconds)


class _Receive:
    def __init__(self, pending: Pending, on_received: Callable[[], None]) -> None:
        self._pending = pending
        self._on_received = on_received

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        self._pending.wait(timeout_seconds)
        self._on_received()


class FaultyLink(Link):
    """One end of a link."""

    def __init__(self, link_id: str, link: Link, on_send: OnSend, on_received: OnReceived) -> None:
        self.link_id = link_id
        self._link = link
        self._on_send = on_send
        self._on_received = on_received
        self._step = Step.HANDSHAKE  # of the message that was sent last
        self._num_segments = 0

    def start_send(self, tensors: Message) -> Pending:
        """See ``Link.start_send``."""
        self._look(tensors[0])
        started: list[Pending] = []

        def send(message: Message) -> None:
            started.append(self._link.start_send(message))

        self._on_send(self._step, self, tensors, send)
        return _Sends(started)

    def start_recv(self, tensor: Tensor) -> Pending:
        """See ``Link.start_recv``."""
        return _Receive(self._link.start_recv(tensor), lambda: self._on_received(self))

    def close(self) -> None:
        """See ``Link.close``."""
        self._link.close()

    def _look(self, tensor: Tensor) -> None:
        kind = Header.unpack(as_bytes(tensor[:HEADER_BYTES])).kind
        if kind is Kind.DATA:
            self._step = Step.FIRST if self._num_segments == 0 else Step.MIDDLE
            self._num_segments += 1
        elif kind in (Kind.END, Kind.ABORT):
            self._step = Step.END


class FaultyTransport:
    """Wraps the transport of one worker."""

    def __init__(
        self,
        transport: Transport,
        on_send: OnSend = _send_as_it_is,
        on_received: OnReceived = lambda link: None,
    ) -> None:
        self._transport = transport
        self._on_send = on_send
        self._on_received = on_received
        self._lock = threading.Lock()
        self._links: list[FaultyLink] = []
        self._is_severed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def links(self) -> list[FaultyLink]:
        """All that were ever made."""
        with self._lock:
            return list(self._links)

    def accept(
        self, link_id: str, timeout_seconds: float, set_up_seconds: float | None = None
    ) -> FaultyLink:
        """See ``Transport.accept``."""
        link = self._transport.accept(link_id, timeout_seconds, set_up_seconds)
        return self._wrap(link_id, link)

    def connect(self, address: str, link_id: str, timeout_seconds: float) -> FaultyLink:
        """See ``Transport.connect``."""
        return self._wrap(link_id, self._transport.connect(address, link_id, timeout_seconds))

    def sever(self) -> None:
        """Break every link without a word, and make no other: what a kill does to them."""
        with self._lock:
            self._is_severed = True
        for link in self.links:
            link.close()
        self._transport.close()

    def _wrap(self, link_id: str, link: Link) -> FaultyLink:
        wrapped = FaultyLink(link_id, link, self._on_send, self._on_received)
        with self._lock:
            self._links.append(wrapped)
            is_severed = self._is_severed
        if is_severed:
            link.close()
            raise LinkBrokenError("this worker was killed")
        return wrapped
