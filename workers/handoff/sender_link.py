"""One link of a sender, and the thread that feeds it.

All state of the transfers is guarded by the sender's one lock; the thread holds it only to pick the
next message, never while it gathers or waits. Two messages may be on the wire: while one is, the
next is gathered into the other staging buffer.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from antiphon.config import HandoffConfig
from antiphon.errors import HandoffError, LinkBrokenError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.counters import LinkCounts, Tally
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.handshake import greet, refusal_reason
from antiphon.workers.handoff.link_log import LinkLog
from antiphon.workers.handoff.outgoing import (
    BusyClock,
    Computed,
    Cut,
    Flight,
    Message,
    Outgoing,
    account,
    next_message,
)
from antiphon.workers.handoff.segment import (
    Epochs,
    Header,
    Kind,
    SenderAccount,
    as_tensor,
    checksum,
)
from antiphon.workers.handoff.staging import Staging
from antiphon.workers.handoff.transport import Link, Place

_IDLE_SECONDS = 60.0  # an idle thread lets go of its staging buffers
_MAX_REASON_BYTES = 1024
_MAX_FLIGHTS = 2  # one for each staging buffer


@dataclass(frozen=True, slots=True)
class SenderLimits:
    """Bounds of a ``HandoffSender``."""

    timeout_seconds: float = 10.0  # to connect; for the receiver to take a segment
    max_links: int = 64
    segment_bytes: int = Place.HOST.segment_bytes  # larger pushes are split; a link stages two
    piece_bytes: int = 2 << 20  # less than this waits for more, or for the prompt's end

    @classmethod
    def of(cls, config: HandoffConfig, place: Place) -> "SenderLimits":
        """What is configured, with segments that suit where the transport wants payload."""
        return cls(
            max_links=config.max_links,
            segment_bytes=place.segment_bytes,
            piece_bytes=config.piece_bytes,
        )


# Called with (link, the transfer that ended or None for all of them and the link, error).
OnEnd = Callable[["SenderLink", Outgoing | None, HandoffError | None], None]


class SenderLink:
    """Made on first use, broken by the first error."""

    def __init__(
        self,
        endpoint: Endpoint,
        limits: SenderLimits,
        offer: LinkOffer,
        tally: Tally,
        log: LinkLog,
    ) -> None:
        self.offer = offer
        self.is_left = False  # guarded by the sender's lock: to be closed once it is idle
        self.counts = LinkCounts(offer.receiver_name or offer.address, "sent")
        self.transfers: dict[str, Outgoing] = {}  # oldest first; the sender removes what ended
        self._endpoint = endpoint
        self._timeout_seconds = limits.timeout_seconds
        bytes_per_token = endpoint.store.num_bytes_per_token
        segment_bytes = min(limits.segment_bytes, offer.segment_bytes)
        self._cut = Cut(
            max_tokens=max(1, segment_bytes // bytes_per_token),
            min_tokens=max(1, limits.piece_bytes // bytes_per_token),
            block_size=endpoint.store.block_size,
        )
        self._tally = tally
        self._log = log
        place = endpoint.transport.place
        self._staging = Staging(endpoint.store, place, tally.staging_resized)
        self._epochs = Epochs.of(endpoint.incarnation, offer.receiver_incarnation)
        self._clock = BusyClock()
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

    def push(
        self, transfer_id: str, block_table: Sequence[int], span: tuple[int, int], mark: Any
    ) -> None:
        """See ``HandoffSender.push``."""
        transfer = self.transfers[transfer_id]
        start, end = span
        if start != transfer.num_pushed or end < start or transfer.finished_at is not None:
            raise ValueError(
                f"transfer {transfer_id}: pushed [{start}, {end}) after token {transfer.num_pushed}"
            )
        transfer.block_table = tuple(block_table)
        transfer.num_pushed = end
        transfer.mark = mark
        self._changed.notify_all()

    def finish(self, transfer_id: str, computed: Computed) -> None:
        """See ``HandoffSender.finish``."""
        transfer = self.transfers[transfer_id]
        transfer.finished_at, transfer.computed = time.monotonic(), computed
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
        greeted = False
        try:
            link = self._connect()
            greeted = True
            self._feed(link)
        except HandoffError as broken:
            error = broken
        except Exception as unexpected:
            error = LinkBrokenError(f"the link's thread failed: {unexpected!r}")
            error.__cause__ = unexpected
        if self._link is not None:
            self._link.close()
        if not self._closing:
            self._account_for(error, None if greeted else refusal_reason(error), greeted)
        self._staging.release()
        self._on_end(self, None, error)

    def _account_for(self, error: HandoffError, refused: str | None, greeted: bool) -> None:
        """Count and log the end of a link that nobody here has closed."""
        link_id, peer = self.offer.link_id, self.counts.peer
        if refused is not None:
            self._tally.refused_link(refused)
            self._log.refused(peer, link_id, refused, error)
            return
        if greeted:
            self._tally.broken_link()
        with self._changed:
            transfer_ids = tuple(self.transfers)
        self._log.broke(peer, link_id, error, transfer_ids)

    def _connect(self) -> Link:
        offer = self.offer
        transport = self._endpoint.transport
        link = transport.connect(offer.address, offer.link_id, self._timeout_seconds)
        with self._changed:
            self._link = link
            if self._closing:
                raise LinkBrokenError("the link was closed by this worker")
        greet(link, self._endpoint.wire, self._epochs, self._timeout_seconds)
        self._tally.link_made(is_prewarmed=self.is_idle)
        return link

    def _feed(self, link: Link) -> None:
        """Send messages until the link is closed."""
        flights: deque[Flight] = deque()
        while (message := self._next(may_wait=not flights)) is not None or flights:
            if message is None or len(flights) == _MAX_FLIGHTS:
                self._land(flights.popleft())
            if message is not None and (flight := self._launch(link, message)) is not None:
                flights.append(flight)

    def _next(self, *, may_wait: bool) -> Message | None:
        """The next message; None if there is none yet, or when closing."""
        with self._changed:
            while not self._closing:
                message = next_message(self.transfers.values(), self._cut)
                if message is not None or not may_wait:
                    return message
                if not self._changed.wait(_IDLE_SECONDS):
                    self._staging.release()
        return None

    def _launch(self, link: Link, message: Message) -> Flight | None:
        """Put a message on the wire; None if its KV can't be read, which aborts its transfer."""
        num_bytes = 0
        if message.kind is Kind.DATA:
            num_bytes = (message.span[1] - message.span[0]) * self._staging.num_bytes_per_token
            try:
                tensors = self._segment(message, num_bytes)
            except Exception as error:
                with self._changed:
                    message.transfer.abort_reason = f"reading the KV cache failed: {error!r}"
                return None
        else:  # an error breaks the link: nothing else would end the transfer any more
            tensors = [self._last_word(message)]
        began = time.perf_counter()
        return Flight(message, num_bytes, began, link.start_send(tensors))

    def _last_word(self, message: Message) -> Tensor:
        reason = as_tensor((message.abort_reason or "").encode()[:_MAX_REASON_BYTES])
        header = self._header(message, reason.numel(), checksum(reason))
        return torch.cat([as_tensor(header.pack()), reason])

    def _segment(self, message: Message, num_bytes: int) -> list[Tensor]:
        if message.transfer.began_at is None:
            message.transfer.began_at = time.monotonic()
        frame = self._staging.next_frame(num_bytes)
        payload = frame.payload(num_bytes)
        try:
            self._staging.gather(message.block_table, message.span, payload, message.mark)
            header = self._header(message, num_bytes, self._staging.checksum(payload))
        except Exception:
            self._staging.put_back()  # the other one may be on the wire
            raise
        return frame.tensors(header.pack(), num_bytes)

    def _header(self, message: Message, num_bytes: int, payload_checksum: int) -> Header:
        is_end = message.kind is Kind.END
        said = account(message.transfer, time.monotonic()) if is_end else SenderAccount()
        return Header(
            message.kind,
            self._epochs,
            bytes.fromhex(message.transfer.transfer_id),
            *message.span,
            num_bytes,
            payload_checksum,
            said,
        )

    def _land(self, flight: Flight) -> None:
        """Wait until the receiver has taken a message."""
        message, transfer = flight.message, flight.message.transfer
        flight.pending.wait(self._timeout_seconds)
        if message.kind is Kind.DATA:
            seconds = self._clock.landed(flight)
            transfer.num_bytes += flight.num_payload_bytes
            transfer.busy_seconds += seconds
            self._tally.sent(flight.num_payload_bytes, seconds)
            self.counts.add(flight.num_payload_bytes, seconds)
        elif message.kind is Kind.END:
            self._tally.completed()
            self._on_end(self, transfer, None)
        else:
            reason = f"the transfer was given up: {message.abort_reason}"
            self._on_end(self, transfer, HandoffError(reason))
