"""What carries bytes between two workers.

A link is private to one pair of workers, ordered, and used by one thread at each end. KV crosses it
from the end that connected (the sender) to the end that accepted (the receiver); the way back
carries only the answer in the handshake. Each tensor that is sent meets exactly one receive, which
may have room for more; how much came is for the message to say. A link breaks once and as a whole:
after any error, both ends' calls raise ``LinkBrokenError``, and its id is never used again.

Sends and receives are started and waited for apart, so that the next segment can be prepared while
one is on the wire. What was started first is waited for first.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Place(enum.Enum):
    """Where payload must lie while a transport carries it."""

    HOST = enum.auto()  # pinned, if the KV cache is on a GPU
    DEVICE = enum.auto()  # beside the KV cache

    @property
    def segment_bytes(self) -> int:
        """The largest segment that is worth while.

        On the host one that is still in a core's cache (L2, 0.5 to 2 MiB) when it is sent, or
        checked and written to its blocks: larger ones were slower. On a GPU one that a kernel's
        start is short beside.
        """
        return 768 << 10 if self is Place.HOST else 4 << 20


class Pending(Protocol):
    """A send or receive that was started."""

    def wait(self, timeout_seconds: float | None) -> None:
        """Wait for the end. One that came before the link broke is an end like any other.

        Args:
            timeout_seconds: Running out of it breaks the link. None: wait as long as the link
                lives, without using the CPU.

        Raises:
            LinkBrokenError: The peer died, did not act in time, or the link was closed.
        """


class Link(ABC):
    """One end of a link."""

    @abstractmethod
    def start_send(self, tensors: Sequence[Tensor]) -> Pending:
        """Send contiguous 1-D uint8 tensors in order; they may be reused once it has ended.

        Raises:
            LinkBrokenError: The link is broken.
        """

    @abstractmethod
    def start_recv(self, tensor: Tensor) -> Pending:
        """Receive what is sent next, as soon as it comes.

        Args:
            tensor: Contiguous 1-D uint8, at least as long; more breaks the link. On the host the
                rest keeps what it held; on a GPU the lengths must be equal. Undefined after an
                error.

        Raises:
            LinkBrokenError: The link is broken.
        """

    @abstractmethod
    def close(self) -> None:
        """Break the link, from any thread; calls that are blocked at either end raise at once."""

    def send(self, tensors: Sequence[Tensor], timeout_seconds: float) -> None:
        """Start a send and wait for it."""
        self.start_send(tensors).wait(timeout_seconds)

    def recv(self, tensor: Tensor, timeout_seconds: float | None) -> None:
        """Start a receive and wait for it."""
        self.start_recv(tensor).wait(timeout_seconds)


class Transport(Protocol):
    """Makes links."""

    place: Place

    @property
    def address(self) -> str:
        """Where other workers reach ``accept``, as host:port."""

    def accept(
        self, link_id: str, timeout_seconds: float, set_up_seconds: float | None = None
    ) -> Link:
        """Wait for the other end of a link.

        Args:
            link_id: Of a link that is offered.
            timeout_seconds: For the other end to come.
            set_up_seconds: For the rest, from then on; ``connect`` has its own bound for that. The
                end that gives up last holds the link that long. None: ``timeout_seconds``.

        Raises:
            TimeoutError: Nobody connected; ``accept`` may be called again.
            LinkBrokenError: The link was refused, or its set-up failed.
        """

    def connect(self, address: str, link_id: str, timeout_seconds: float) -> Link:
        """Connect to a worker that accepts, or will soon accept, ``link_id``.

        Raises:
            LinkBrokenError: No worker is there, it refuses the link, or it does not answer in time.
        """

    def refuse(self, link_id: str) -> None:
        """Never accept this link (again); an ``accept`` or ``connect`` under way raises at once."""

    def close(self) -> None:
        """Refuse all links that are being accepted; established links go on until closed."""
