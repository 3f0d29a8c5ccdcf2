"""One link of a sender, and the thread that feeds it.

All state is guarded by the sender's one lock; the thread holds it only to pick the next thing to
send, never while it gathers or sends.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from antiphon.errors import HandoffError, LinkBrokenError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.handshake import greet
from antiphon.workers.handoff.segment import Epochs, Header, Kind, as_tensor, checksum
from antiphon.workers.handoff.transport import Link

_IDLE_SECONDS = 60.0  # an idle thread looks around this often, though it is always notified
_MAX_REASON_BYTES = 1024


@dataclass(slots=True, eq=False)
class Outgoing:
    """A transfer that is being sent."""

    transfer_id: str
    num_sent: int  # tokens before this one were sent
    num_pushed: int  # tokens before this one are computed
    block_table: tuple[int, ...] = ()
    is_finished: bool = False
    abort_reason: str | None = None
    num_bytes: int = 0
    busy_seconds: float = 0.0

    @property
    def has_work(self) -> bool:
        """Whether there is something to say to the receiver."""
        return self.num_sent < self.num_pushed or self.is_finished or self.abort_reason is not None


# Called with (link, the transfer that ended or None for all of them and the link, error).
OnEnd = Callable[["SenderLink", Outgoing | None, HandoffError | None], None]


class SenderLink:
    """Made on first use, broken by the first error."""

    def __init__(
        self, endpoint: Endpoint, timeout_seconds: float, segment_bytes: int, offer: LinkOffer
    ) -> None:
        self.offer = offer
        self.transfers: dict[str, Outgoing] = {}  # oldest first; the sender removes what ended
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        bytes_per_token = endpoint.store.num_bytes_per_token
        self._max_segment_tokens = max(1, segment_bytes // bytes_per_token)
        self._staging = torch.empty(self._max_segment_tokens * bytes_per_token, dtype=torch.uint8)
        self._epochs = Epochs.of(endpoint.incarnation, offer.receiver_incarnation)
        self._link: Link | None = None
        self._closing = False

    def start(self, lock: threading.Lock, on_end: OnEnd) -> None:
        """Start the thread; ``on_end`` is called without the lock."""
        self._changed = threading.Condition(lock)
        self._on_end = on_end
        name = f"handoff-send-{self.offer.link_id[:8]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether no transfer needs this link."""
        return not self.transfers

    def add(self, transfer: Outgoing) -> None:
        """Take a transfer on; the caller holds the lock, here and below."""
        self.transfers[transfer.transfer_id] = transfer

    def push(self, transfer_id: str, block_table: Sequence[int], start: int, end: int) -> None:
        """See ``HandoffSender.push``."""
        transfer = self.transfers[transfer_id]
        if start != transfer.num_pushed or end < start or transfer.is_finished:
            raise ValueError(
                f"transfer {transfer_id}: pushed [{start}, {end}) after token {transfer.num_pushed}"
            )
        transfer.block_table = tuple(block_table)
        transfer.num_pushed = end
        self._changed.notify_all()

    def finish(self, transfer_id: str) -> None:
        """See ``HandoffSender.finish``."""
        self.transfers[transfer_id].is_finished = True
        self._changed.notify_all()

    def abort(self, transfer_id: str, reason: str) -> None:
        """See ``HandoffSender.abort``."""
        self.transfers[transfer_id].abort_reason = reason
        self._changed.notify_all()

    def close(self) -> None:
        """Break the link; the lock is free, here and below."""
        with self._changed:
            self._closing = True
            link = self._link
            self._changed.notify_all()
        if link is not None:
            link.close()

    def join(self) -> None:
        """Wait for the thread; after ``close`` only connecting can hold it up, for the time-out."""
        self._thread.join(2 * self._timeout_seconds + 1)

    def _run(self) -> None:
        error: HandoffError = LinkBrokenError("the link was closed by this worker")
        try:
            link = self._connect()
            while (transfer := self._next()) is not None:
                self._serve(link, transfer)
        except HandoffError as broken:
            error = broken
        except Exception as unexpected:
            error = LinkBrokenError(f"the link's thread failed: {unexpected!r}")
            error.__cause__ = unexpected
        if self._link is not None:
            self._link.close()
        self._on_end(self, None, error)

    def _connect(self) -> Link:
        offer = self.offer
        transport = self._endpoint.transport
        link = transport.connect(offer.address, offer.link_id, self._timeout_seconds)
        with self._changed:
            self._link = link
            if self._closing:
                raise LinkBrokenError("the link was closed by this worker")
        greet(link, self._endpoint.wire, self._epochs, self._timeout_seconds)
        return link

    def _next(self) -> Outgoing | None:
        """Wait for the oldest transfer with something to send; None when closing."""
        with self._changed:
            while not self._closing:
                for transfer in self.transfers.values():
                    if transfer.has_work:
                        return transfer
                self._changed.wait(_IDLE_SECONDS)
        return None

    def _serve(self, link: Link, transfer: Outgoing) -> None:
        """Send one segment of a transfer, or how it ended."""
        with self._changed:
            reason = transfer.abort_reason
            start, table = transfer.num_sent, transfer.block_table
            end = min(transfer.num_pushed, start + self._max_segment_tokens)
        if reason is not None:
            text = as_tensor(reason.encode()[:_MAX_REASON_BYTES])
            self._send(link, Kind.ABORT, transfer, (start, start), text)
            self._on_end(self, transfer, HandoffError(f"the transfer was given up: {reason}"))
        elif start == end:
            self._send(link, Kind.END, transfer, (0, end), as_tensor(b""))
            self._on_end(self, transfer, None)
        else:
            self._send_segment(link, transfer, table, (start, end))

    def _send_segment(
        self, link: Link, transfer: Outgoing, block_table: tuple[int, ...], span: tuple[int, int]
    ) -> None:
        began = time.perf_counter()
        start, end = span
        payload = self._staging[: (end - start) * self._endpoint.store.num_bytes_per_token]
        try:
            self._endpoint.store.gather(block_table, start, end, payload)
        except Exception as error:
            with self._changed:
                transfer.abort_reason = f"reading the KV cache failed: {error!r}"
            return
        self._send(link, Kind.DATA, transfer, span, payload)
        transfer.num_sent = end
        transfer.num_bytes += payload.numel()
        transfer.busy_seconds += time.perf_counter() - began

    def _send(
        self, link: Link, kind: Kind, transfer: Outgoing, span: tuple[int, int], payload: Tensor
    ) -> None:
        header = Header(
            kind,
            self._epochs,
            bytes.fromhex(transfer.transfer_id),
            *span,
            payload.numel(),
            checksum(payload),
        )
        message = [as_tensor(header.pack())]
        link.send([*message, payload] if payload.numel() else message, self._timeout_seconds)
