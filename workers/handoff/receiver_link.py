"""One link of a receiver, and the thread that reads it.

The thread always has the receive for the next header posted, without a time-out: that costs
nothing while the link is idle, and shows a dead peer at once. A peer that hangs is found by the
transfers' time-out. Whatever a header announces is read before it is judged, so that the link stays
in step; only a header that can't be trusted breaks the link.

If the next header is here when a payload is complete, the next payload's receive is posted, into
the other staging buffer, before the first is written to its blocks: the wire is not idle meanwhile.

    header k ─▶ post payload k and header k+1 ─▶ write k-1 to its blocks ─▶ payload k is here ─▶ ...
"""

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from antiphon.errors import HandoffError, LinkBrokenError, SegmentRejectedError
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.handshake import answer
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.segment import HEADER_BYTES, Epochs, Header, Kind, as_bytes
from antiphon.workers.handoff.staging import Staging
from antiphon.workers.handoff.transport import Link, Pending

if TYPE_CHECKING:
    from antiphon.workers.handoff.receiver import HandoffReceiver


@dataclass(frozen=True, slots=True)
class _Message:
    header: Header
    payload: Tensor
    pending: Pending | None  # None: there is no payload to wait for
    began: float


class ReceiverLink:
    """Offered, then connected, then broken; never reused."""

    def __init__(
        self, endpoint: Endpoint, receiver: "HandoffReceiver", link_id: str, peer_incarnation: str
    ) -> None:
        self.link_id = link_id
        self.peer_incarnation = peer_incarnation
        self.transfers: dict[str, Incoming] = {}  # guarded by the receiver's lock
        self.is_closing = False
        self._endpoint = endpoint
        self._receiver = receiver
        self._epochs = Epochs.of(peer_incarnation, endpoint.incarnation)
        self._staging = Staging(
            endpoint.store, endpoint.transport.place, receiver.tally.staging_resized
        )
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._thread: threading.Thread | None = None

    def ensure_started(self) -> None:
        """Start to accept and read: when a transfer is expected, or to prewarm the link."""
        if self._thread is None:
            name = f"handoff-recv-{self.link_id[:8]}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Break the link, or stop offering it."""
        with self._lock:
            self.is_closing = True
            link = self._link
        if link is not None:
            link.close()
        else:
            self._endpoint.transport.refuse(self.link_id)

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        error: HandoffError = LinkBrokenError("the link was closed by this worker")
        try:
            link = self._accept()
            if link is not None:
                answer(
                    link,
                    self._endpoint.wire,
                    self._epochs,
                    self._receiver.limits.io_timeout_seconds,
                )
                self._receiver.tally.link_made(is_prewarmed=not self.transfers)
                self._read(link)
        except HandoffError as broken:
            error = broken
        except Exception as unexpected:
            error = LinkBrokenError(f"the link's thread failed: {unexpected!r}")
            error.__cause__ = unexpected
        if self._link is not None:
            self._link.close()
        self._staging.release()
        self._receiver.link_ended(self, error, was_connected=self._link is not None)

    def _accept(self) -> Link | None:
        """Wait for the sender for as long as transfers are expected from it."""
        while True:
            try:
                link = self._endpoint.transport.accept(
                    self.link_id, self._receiver.limits.timeout_seconds
                )
            except TimeoutError:
                if self._receiver.forget_if_idle(self):
                    return None
                continue
            with self._lock:
                self._link = link
                if self.is_closing:
                    raise LinkBrokenError("the link was closed by this worker")
            return link

    def _read(self, link: Link) -> None:
        """Receive and deliver messages until the link breaks."""
        raw = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        next_header = link.start_recv(raw)
        undelivered: _Message | None = None
        while True:
            try:
                next_header.wait(timeout_seconds=None)
                message = self._start_payload(link, Header.unpack(as_bytes(raw)))
                next_header = link.start_recv(raw.zero_())
            finally:
                if undelivered is not None:
                    self._deliver(undelivered)
            if message.pending is not None:
                message.pending.wait(self._receiver.limits.io_timeout_seconds)
            undelivered = message if Header.is_whole(as_bytes(raw)) else None
            if undelivered is None:
                self._deliver(message)

    def _start_payload(self, link: Link, header: Header) -> _Message:
        began = time.perf_counter()
        num_bytes = header.num_payload_bytes
        if header.kind is Kind.DATA:
            payload = self._staging.next_payload(num_bytes)
        else:
            payload = torch.empty(num_bytes, dtype=torch.uint8)
        return _Message(header, payload, link.start_recv(payload) if num_bytes else None, began)

    def _reason_to_discard(self, header: Header, transfer: Incoming | None) -> str | None:
        """Why a message says nothing about any transfer of this link."""
        if header.epochs != self._epochs:
            return "stale_epoch"
        if transfer is None:
            return "unknown_transfer"
        if transfer.link_id != self.link_id:
            return "wrong_link"
        return None

    def _deliver(self, message: _Message) -> None:
        """Judge a message that has arrived, and let it have its effect."""
        header, payload = message.header, message.payload
        transfer = self._receiver.find(header.transfer_id.hex())
        reason = self._reason_to_discard(header, transfer)
        if transfer is None or reason is not None:
            self._receiver.tally.discarded(reason or "unknown_transfer")
            return
        try:
            if header.kind is Kind.DATA:
                self._write(message, transfer)
            elif header.kind is Kind.END:
                transfer.check_end(header)
                self._receiver.complete(transfer, header.age_microseconds / 1e6)
            elif header.kind is Kind.ABORT:
                reason = as_bytes(payload).decode(errors="replace")
                self._receiver.end(transfer, HandoffError(f"the sender gave up: {reason}"))
            else:
                raise SegmentRejectedError("kind: a handshake in the middle of a transfer")
        except SegmentRejectedError as error:
            self._receiver.tally.discarded(str(error).partition(":")[0])
            self._receiver.end(transfer, error)

    def _write(self, message: _Message, transfer: Incoming) -> None:
        payload = message.payload
        try:
            discarded = transfer.take(message.header, payload, self._staging)
        except SegmentRejectedError:
            raise
        except Exception as error:
            failed = HandoffError(f"writing to the KV cache failed: {error!r}")
            self._receiver.end(transfer, failed)
            return
        if discarded is None:
            seconds = time.perf_counter() - message.began
            self._receiver.tally.segment(payload.numel(), seconds)
        else:
            self._receiver.tally.discarded(discarded)
