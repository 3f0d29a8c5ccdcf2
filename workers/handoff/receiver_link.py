"""One link of a receiver, and the thread that reads it.

The thread always has the receives for the next two messages posted, without a time-out: that costs
nothing while the link is idle, and shows a dead peer at once. A peer that hangs is found by the
transfers' time-out. While one segment is checked and written to its blocks, the next one arrives in
the other buffer. Whatever comes is read before it is judged, so that the link stays in step; only a
header that can't be trusted breaks the link.
"""

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from antiphon.config import HandoffConfig
from antiphon.errors import HandoffError, LinkBrokenError, SegmentRejectedError, WorkerBusyError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.counters import LinkCounts
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.handshake import answer, refusal_reason
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.segment import Epochs, Header, Kind, as_bytes
from antiphon.workers.handoff.staging import Frame, Staging
from antiphon.workers.handoff.transport import Link, Pending, Place

if TYPE_CHECKING:
    from antiphon.workers.handoff.receiver import HandoffReceiver


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    """Bounds of a ``HandoffReceiver``."""

    timeout_seconds: float = 60.0  # from expect to END
    io_timeout_seconds: float = 10.0  # for set-up and handshake; for a payload beside its header
    max_links: int = 64
    segment_bytes: int = Place.HOST.segment_bytes  # the largest payload; a link stages two

    @classmethod
    def of(cls, config: HandoffConfig, place: Place) -> "ReceiverLimits":
        """What is configured, with segments that suit where the transport wants payload."""
        return cls(
            timeout_seconds=config.timeout_seconds,
            max_links=config.max_links,
            segment_bytes=place.segment_bytes,
        )


class ReceiverLink:
    """Offered, then connected, then broken; never reused."""

    def __init__(
        self, endpoint: Endpoint, receiver: "HandoffReceiver", link_id: str, peer: tuple[str, str]
    ) -> None:
        self.link_id = link_id
        self.peer_incarnation, peer_name = peer
        self.counts = LinkCounts(peer_name or self.peer_incarnation, "received")
        self.transfers: dict[str, Incoming] = {}  # guarded by the receiver's lock
        self.is_closing = False
        self.sender_error: HandoffError | None = None  # it says that the link broke
        self.is_prewarm = False  # until a transfer wants it, nobody else hears of its failure
        self._endpoint = endpoint
        self._receiver = receiver
        self._epochs = Epochs.of(self.peer_incarnation, endpoint.incarnation)
        self._staging = Staging(
            endpoint.store, endpoint.transport.place, receiver.tally.staging_resized
        )
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._has_greeted = False
        self._thread: threading.Thread | None = None

    @property
    def staging_bytes(self) -> int:
        """Memory that the sender's next messages land in."""
        return self._staging.num_bytes

    def offer(self, address: str) -> LinkOffer:
        """How its sender reaches it, given the transport's address."""
        return LinkOffer(
            address=address,
            link_id=self.link_id,
            receiver_incarnation=self._endpoint.incarnation,
            segment_bytes=self._receiver.limits.segment_bytes,
            receiver_name=self._endpoint.name,
        )

    def ensure_started(self) -> None:
        """Start to accept and read: when a transfer is expected, or to prewarm the link.

        Raises:
            WorkerBusyError: This worker may have no further thread; it can be tried again.
        """
        if self._thread is None:
            name = f"handoff-recv-{self.link_id[:8]}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise WorkerBusyError(f"no thread for a hand-off link: {error}") from error
            self._thread = thread

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
                self._has_greeted = True
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
        is_news = not self.is_closing
        if self.is_closing and self.sender_error is not None:  # which is why this end closed it
            error, is_news = self.sender_error, True
        if is_news:
            self._account_for(error)
        self._receiver.link_ended(self, error)

    def _account_for(self, error: HandoffError) -> None:
        """Count and log the end of a link that broke, or that the ends do not agree about."""
        tally, log, peer = self._receiver.tally, self._receiver.log, self.counts.peer
        refused = None if self._has_greeted else refusal_reason(error)
        transfer_ids = tuple(self.transfers)
        if refused is not None:
            tally.refused_link(refused)
            log.refused(peer, self.link_id, refused, error)
        else:
            if self._link is not None:
                tally.broken_link()
            log.broke(peer, self.link_id, error, transfer_ids)
        if self.is_prewarm and not self._has_greeted and not transfer_ids:
            tally.prewarm_failed("broken" if refused is None else "refused")

    def _accept(self) -> Link | None:
        """Wait for the sender for as long as transfers are expected from it."""
        limits = self._receiver.limits
        while True:
            try:
                link = self._endpoint.transport.accept(
                    self.link_id, limits.timeout_seconds, limits.io_timeout_seconds
                )
            except TimeoutError:
                if self._receiver.forget_if_idle(self):
                    self._give_up_waiting()
                    return None
                continue
            with self._lock:
                self._link = link
                if self.is_closing:
                    raise LinkBrokenError("the link was closed by this worker")
            return link

    def _give_up_waiting(self) -> None:
        """Nobody has connected, and no transfer wants it any more."""
        if self.is_prewarm and not self.is_closing:
            self._receiver.log.not_prewarmed(self.counts.peer, self.link_id)
            self._receiver.tally.prewarm_failed("no_answer")
        self.is_closing = True

    def _read(self, link: Link) -> None:
        """Receive and deliver messages until the link breaks."""
        num_bytes = max(self._receiver.limits.segment_bytes, self._staging.num_bytes_per_token)
        frames = deque(self._staging.next_frame(num_bytes) for _ in range(2))
        pending = deque(link.start_recv(frame.message) for frame in frames)
        while True:
            pending.popleft().wait(timeout_seconds=None)
            self._take(link, frames[0])
            try:
                pending.append(link.start_recv(frames[0].message))
            except LinkBrokenError:
                self._take_landed(link, pending.popleft(), frames[1])
                raise
            frames.rotate()

    def _take_landed(self, link: Link, pending: Pending, frame: Frame) -> None:
        """Deliver the message that had landed before its sender closed the link, if one had.

        To the sender it was delivered, and its link idle. Nothing counts once this end has closed.
        """
        with contextlib.suppress(LinkBrokenError):  # at once, if nothing had come
            pending.wait(self._receiver.limits.io_timeout_seconds)
            is_kv = Header.unpack(frame.header).kind is Kind.DATA
            # KV beside its header cannot come any more: its receive is posted after the header's.
            if not self.is_closing and not (is_kv and frame.is_split):
                self._take(link, frame)

    def _take(self, link: Link, frame: Frame) -> None:
        """Deliver a message, with the payload that may come beside it."""
        header = Header.unpack(frame.header)
        num_bytes = header.num_payload_bytes
        is_kv = header.kind is Kind.DATA
        if num_bytes > (frame.capacity if is_kv else frame.text_capacity):
            raise SegmentRejectedError(f"segment header: {num_bytes} payload bytes do not fit here")
        payload = frame.payload(num_bytes) if is_kv else frame.text(num_bytes)
        if is_kv and frame.is_split:
            link.recv(payload, self._receiver.limits.io_timeout_seconds)
        self._deliver(header, payload)

    def _reason_to_discard(self, header: Header, transfer: Incoming | None) -> str | None:
        """Why a message says nothing about any transfer of this link."""
        if header.epochs != self._epochs:
            return "stale_epoch"
        if transfer is None:
            return "unknown_transfer"
        if transfer.link_id != self.link_id:
            return "wrong_link"
        return None

    def _deliver(self, header: Header, payload: Tensor) -> None:
        """Judge a message that has arrived, and let it have its effect."""
        transfer = self._receiver.find(header.transfer_id.hex())
        reason = self._reason_to_discard(header, transfer)
        if transfer is None or reason is not None:
            # A sender answers each cancel with an ABORT, which brings nothing and is no news.
            if reason != "unknown_transfer" or header.kind is not Kind.ABORT:
                self._discard(header, reason or "unknown_transfer")
            return
        try:
            if header.kind is Kind.DATA:
                self._write(header, payload, transfer)
            elif header.kind is Kind.END:
                transfer.check_end(header)
                self._receiver.complete(transfer, header.account)
            elif header.kind is Kind.ABORT:
                reason = as_bytes(payload).decode(errors="replace")
                self._receiver.end(transfer, HandoffError(f"the sender gave up: {reason}"))
            else:
                raise SegmentRejectedError("kind: a handshake in the middle of a transfer")
        except SegmentRejectedError as error:
            self._receiver.tally.discarded(str(error).partition(":")[0])
            self._receiver.log.rejected(self.counts.peer, transfer.transfer_id, error)
            self._receiver.end(transfer, error)

    def _write(self, header: Header, payload: Tensor, transfer: Incoming) -> None:
        began = time.perf_counter()
        try:
            discarded = transfer.take(header, payload, self._staging)
        except SegmentRejectedError:
            raise
        except Exception as error:
            failed = HandoffError(f"writing to the KV cache failed: {error!r}")
            self._receiver.end(transfer, failed)
            return
        if discarded is None:
            self._receiver.tally.segment(payload.numel(), time.perf_counter() - began)
        else:
            self._discard(header, discarded)

    def _discard(self, header: Header, reason: str) -> None:
        self._receiver.tally.discarded(reason)
        self._receiver.log.discarded(self.counts.peer, header.transfer_id.hex(), reason)
