"""Links over NCCL: headers and small messages on gloo, KV on a private communicator of two GPUs.

A link is a gloo link with a ``ProcessGroupNCCL`` of the same two ranks beside it. Tensors on the
CPU take the first, tensors on the GPU the second. A receive of KV is posted only after its header
has come over gloo, so no kernel spins on an idle link.

* NCCL takes 50 to 100 MB for each pair and kernel blocks for each transfer: channels are capped by
  ``max_ctas``, and the bound on links is what bounds the memory.
* A kernel that waits for a dead peer ends with ``abort`` alone. Time-outs are kept here, not by
  torch's watchdog, which would end the whole process: a link dies alone.
* Making a communicator waits for the peer without a bound, and so does posting the first message:
  NCCL connects the two only then. Both are part of a link's set-up, which ``communicators`` bounds.
  After that, posting a work queues a kernel and returns.
* ``abort`` waits too, and frees what a work may be posted to at that moment. So ``close`` only
  notes that the link is closed and closes gloo; a thread of ``communicators`` takes the lock that
  is held while a work is posted, and then aborts. Nobody else ever lets go of the group.
* ``wait`` of an NCCL work orders streams and returns at once, so the end is polled.
* A work waits for the stream it is posted from, so each link has one: never for the engine's. torch
  has 32 to give (4 with ROCm), in turn: see ``handoff.max_links``.

No GPU has run this. What surrounds NCCL is tested with a stand-in for its process group.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from antiphon.errors import ConfigError, LinkBrokenError
from antiphon.workers.handoff.communicators import Communicators
from antiphon.workers.handoff.gloo import GlooLink, GlooTransport
from antiphon.workers.handoff.transport import Link, Pending, Place

_c10d: Any = torch.distributed  # its stubs lack what is used here
_MAX_CTAS = 4  # blocks of a transfer's kernel: multiprocessors that the engine goes without
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 20e-6, 1e-3
_NEVER = timedelta(days=365)  # for torch's watchdog


def check_nccl() -> None:
    """Refuse the transport where it can't work.

    Raises:
        ConfigError: No GPU is visible, or torch was built without NCCL.
    """
    if not torch.cuda.is_available():
        raise ConfigError("handoff.transport: got 'nccl', but this worker sees no GPU; use 'gloo'")
    if not torch.distributed.is_nccl_available():
        raise ConfigError("handoff.transport: got 'nccl', but this torch has no NCCL; use 'gloo'")


def make_nccl_group(store: Any, rank: int, device: int) -> Any:
    """A communicator of two ranks; both ends call it at the same time.

    Args:
        store: Where the two find each other.
        rank: Of this end.
        device: The GPU; a fresh thread would take the first one.
    """
    torch.cuda.set_device(device)
    # Read by the group when it is made. The defaults end the process on a time-out.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    # The watchdog sleeps four times this after an error, and who ends the group waits for it.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "0")
    options = _c10d.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = _NEVER
    options.config.min_ctas, options.config.max_ctas = 1, _MAX_CTAS
    group = _c10d.ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(torch.device("cuda", device))
    return group


def byte_on_gpu() -> Tensor:
    """Something to send, on the calling thread's device."""
    return torch.empty(1, dtype=torch.uint8, device="cuda")


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor goes over gloo."""
    return tensor.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class NcclParts:
    """What tests replace where there is no GPU.

    Attributes:
        make_group: Makes the communicator from a store, a rank and a device.
        current_device: Of the calling thread.
        make_byte: Makes the first message.
        is_control: Whether a tensor goes over gloo.
        make_stream: Makes what a link's works are posted from, for ``on_stream``.
        on_stream: Enters it.
    """

    make_group: Callable[[Any, int, int], Any] = make_nccl_group
    current_device: Callable[[], int] = torch.cuda.current_device
    make_byte: Callable[[], Tensor] = byte_on_gpu
    is_control: Callable[[Tensor], bool] = is_on_cpu
    make_stream: Callable[[], Any] = torch.cuda.Stream
    on_stream: Callable[[Any], contextlib.AbstractContextManager[Any]] = torch.cuda.stream


class NcclLink(Link):
    """One end of a link.

    Args:
        control: Carries what lies on the CPU.
        group: Carries what lies on the GPU; from now on the link's alone.
        peer_rank: Of the other end.
        parts: How.
        end: Calls what ends the group, on a thread of its own.

    Attributes:
        is_closed: Whether this end has broken the link.
    """

    def __init__(
        self,
        control: GlooLink,
        group: Any,
        peer_rank: int,
        parts: NcclParts,
        end: Callable[[Callable[[], None]], None],
    ) -> None:
        self.is_closed = False
        self._control = control
        self._group: Any | None = group
        self._peer_rank = peer_rank
        self._parts = parts
        self._end = end
        self._stream = parts.make_stream()
        self._lock = threading.Lock()  # held while a work is posted, and to take the group away

    def meet(self, timeout_seconds: float) -> None:
        """Send the first message, as payload goes: from the end that connected.

        Raises:
            LinkBrokenError: It failed or took too long, and the link is closed. What comes before
                the wait has no bound.
        """
        with self._parts.on_stream(self._stream):
            byte = self._parts.make_byte()
        self._post("send" if self._peer_rank == 0 else "recv", byte).wait(timeout_seconds)

    def start_send(self, tensors: Sequence[Tensor]) -> "NcclPending":
        """See ``Link.start_send``."""
        flights: list[Pending] = []
        for tensor in tensors:
            if self._parts.is_control(tensor):
                flights.append(self._control.start_send([tensor]))
            else:
                flights.append(self._post("send", tensor))
        return NcclPending(flights)

    def start_recv(self, tensor: Tensor) -> Pending:
        """See ``Link.start_recv``."""
        if self._parts.is_control(tensor):
            return self._control.start_recv(tensor)
        return self._post("recv", tensor)

    def close(self) -> None:
        """See ``Link.close``; the communicator ends a little later."""
        if self.is_closed:
            return
        self.is_closed = True
        self._control.close()
        self._end(self._abort)

    def _abort(self) -> None:
        with self._lock:
            group, self._group = self._group, None
        if group is not None:  # two may have closed the link at once
            with contextlib.suppress(RuntimeError):  # it may have failed already
                group.abort()

    def _post(self, operation: str, tensor: Tensor) -> "NcclWork":
        try:
            with self._lock, self._parts.on_stream(self._stream):
                if self.is_closed:
                    raise LinkBrokenError("the link was closed at this end")
                work = getattr(self._group, operation)([tensor], self._peer_rank, 0)
        except RuntimeError as error:
            self.close()
            raise LinkBrokenError(f"the link broke: {error}") from error
        return NcclWork(self, work)


class NcclPending:
    """Everything of one send."""

    def __init__(self, flights: Sequence[Pending]) -> None:
        self._flights = flights

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        for flight in self._flights:
            flight.wait(timeout_seconds)


class NcclWork:
    """A send or receive on the GPU."""

    def __init__(self, link: NcclLink, work: Any) -> None:
        self._link = link
        self._work = work

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        pause = _FIRST_POLL_SECONDS
        try:
            while not self._work.is_completed():
                if self._link.is_closed:
                    raise LinkBrokenError("the link was closed at this end")
                if deadline is not None and time.monotonic() > deadline:
                    self._link.close()
                    raise LinkBrokenError(f"the peer did not act in {timeout_seconds} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL_SECONDS)
            failure = self._work.exception()
        except RuntimeError as error:
            failure = error
        if failure is not None:
            self._link.close()
            raise LinkBrokenError(f"the link broke: {failure}")


class NcclTransport(GlooTransport):
    """Makes NCCL links.

    Args:
        host: See ``GlooTransport``.
        parts: Stand-ins, in tests.

    Raises:
        ConfigError: From ``check_nccl``.
    """

    place = Place.DEVICE

    def __init__(self, host: str, parts: NcclParts | None = None) -> None:
        if parts is None:
            check_nccl()
        self._parts = parts or NcclParts()
        self._communicators = Communicators()
        super().__init__(host)

    def _join(self, store: Any, link_id: str, rank: int, timeout_seconds: float) -> Link:
        device = self._parts.current_device()
        control = self._join_gloo(store, link_id, rank, timeout_seconds)
        prefix = _c10d.PrefixStore(f"{link_id}/nccl", store)

        def make() -> NcclLink:
            group = self._parts.make_group(prefix, rank, device)
            link = NcclLink(control, group, 1 - rank, self._parts, self._communicators.end)
            del group  # the link's alone: where the last reference goes, its destructor waits
            try:
                link.meet(timeout_seconds)
            except Exception:
                link.close()
                raise
            return link

        try:
            return self._communicators.make(make, timeout_seconds)
        except Exception:
            control.close()  # which the other end sees, if it got further
            raise
