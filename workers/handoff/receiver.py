"""The decode worker's end: stages what arrives, checks it, and only then lets it touch blocks.

A transfer is *live* from ``expect`` until it has ended or was cancelled. Only a live transfer is
scattered into blocks, under its lock, and ``cancel`` takes the same lock: that is the fence. Once
``cancel`` has returned, or ``on_complete`` was called, nothing writes to the transfer's blocks.

    expect ─▶ live ─all tokens and END─▶ on_complete(None)
                ├──rejected segment, ABORT, link broke, time-out──▶ on_complete(HandoffError)
                └──cancel──▶ (no call)

What arrives for a transfer that is not live is read off the link, discarded and counted; what
answers a cancel is not counted.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence

from antiphon.errors import HandoffError, LinkBrokenError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.counters import HandoffCounters, LinkCounts, Tally
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.link_log import LinkLog
from antiphon.workers.handoff.link_table import LinkTable
from antiphon.workers.handoff.receiver_link import ReceiverLimits, ReceiverLink
from antiphon.workers.handoff.segment import SenderAccount
from antiphon.workers.handoff.watchdog import Watchdog

__all__ = ["HandoffReceiver", "ReceiverLimits"]

OnComplete = Callable[[str, int, HandoffError | None], None]


class HandoffReceiver:
    """Receives transfers from any number of senders.

    Args:
        endpoint: This worker's end.
        limits: Bounds.
        on_complete: Called with (transfer id, tokens received without a gap, error) exactly once
            per expected transfer, unless ``cancel`` returned True for it. It comes from a link's
            thread, the watchdog or ``close``, must not raise and must not block.
    """

    def __init__(self, endpoint: Endpoint, limits: ReceiverLimits, on_complete: OnComplete) -> None:
        self._endpoint = endpoint
        self.limits = limits
        self._on_complete = on_complete
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._transfers: dict[str, Incoming] = {}  # oldest first, so the first to time out first
        self._links = LinkTable(limits.max_links)
        self.tally = Tally()
        self.log = LinkLog()
        self._closed = False
        self._watchdog = Watchdog(
            self._changed, self._transfers, limits.timeout_seconds, self._overdue
        )

    def offer(self, peer_incarnation: str, peer_name: str = "") -> LinkOffer:
        """Say how a prefill worker reaches this one; a fresh link after a break.

        Raises:
            WorkerBusyError: All links are in use.
            LinkBrokenError: The receiver is closed.
        """
        address = self._endpoint.transport.address
        evicted = None
        with self._lock:
            if self._closed:
                raise LinkBrokenError("this worker's hand-off receiver is closed")
            link = self._links.current(peer_incarnation)
            if link is None:
                evicted = self._links.make_room()
                link = ReceiverLink(
                    self._endpoint, self, uuid.uuid4().hex, (peer_incarnation, peer_name)
                )
            self._links.offer(link)
        if evicted is not None:
            evicted.close()
        return link.offer(address)

    def expect(
        self, transfer_id: str, link_id: str, block_table: Sequence[int], start: int, end: int
    ) -> Incoming:
        """Make a transfer live, before its sender is asked for it.

        Args:
            transfer_id: 32 hex digits, never used before.
            link_id: Of the offer that the sender gets.
            block_table: Of the request, from its first token; the blocks of ``[start, end)`` are
                written until the transfer has ended or ``cancel`` has returned.
            start: First token to receive.
            end: One past the last.

        Returns:
            The transfer, to be read only.

        Raises:
            WorkerBusyError: No thread can be started; the transfer is not live.
            LinkBrokenError: The link is gone; get another offer.
        """
        now = time.monotonic()
        with self._lock:
            if transfer_id in self._transfers or not 0 <= start < end:
                raise ValueError(f"transfer {transfer_id} [{start}, {end}) is live or empty")
            link = self._links.get(link_id)
            if link is None or self._closed:
                raise LinkBrokenError(f"link {link_id} is gone; ask for a new offer")
            link.ensure_started()  # first, because it may fail
            transfer = Incoming(transfer_id, link_id, tuple(block_table), (start, end), now)
            self._transfers[transfer_id] = transfer
            link.transfers[transfer_id] = transfer
            self._changed.notify_all()
            return transfer

    def prewarm(self, peer_incarnation: str, peer_name: str = "") -> LinkOffer | None:
        """Offer a link and wait for its sender before a transfer needs it.

        Returns:
            What to tell the sender; None if the peer has a link, or no further one is allowed: none
            is given up for one that may be wanted.

        Raises:
            WorkerBusyError: No thread can be started; a transfer will try again.
            LinkBrokenError: The receiver is closed.
        """
        with self._lock:
            if self._links.current(peer_incarnation) is not None or self._links.is_full:
                return None
        offer = self.offer(peer_incarnation, peer_name)
        with self._lock:
            if link := self._links.get(offer.link_id):
                link.is_prewarm = True
                link.ensure_started()
        return offer

    def cancel(self, transfer_id: str) -> bool:
        """Stop a transfer; on return nothing will write to its blocks any more.

        Waits for a scatter under way, which takes milliseconds.

        Returns:
            Whether it was live; then ``on_complete`` is not called for it.
        """
        with self._lock:
            transfer = self._transfers.get(transfer_id)
        was_live = transfer is not None and transfer.fence()
        if transfer is not None:
            self._forget(transfer)
        return was_live

    def retire(self, link_id: str) -> None:
        """Offer another link from now on: the peer may hang. Transfers on this one go on."""
        with self._lock:
            link = self._links.get(link_id)
            if link is None or not self._links.is_current(link):
                return
            is_idle = self._links.retire(link)
        if is_idle:  # its last transfer may have ended a moment ago
            link.close()
        elif num_bytes := link.staging_bytes:
            self.log.quarantined(link.counts.peer, link_id, num_bytes)

    def broke(self, link_id: str, reason: str) -> None:
        """Offer another link from now on: the sender says that this one broke.

        This end may never notice by itself. Each transfer on it is for its owner to cancel.
        """
        with self._lock:
            link = self._links.get(link_id)
            if link is None:
                return
            link.sender_error = LinkBrokenError(f"the sender says: {reason}")
            is_idle = self._links.retire(link)
        if is_idle:
            link.close()

    def leave(self, peer_incarnation: str) -> None:
        """Give up the idle links of a lost peer: where its packets vanish, nothing breaks them."""
        with self._lock:
            idle = self._links.leave(peer_incarnation)
        for link in idle:
            link.close()

    def carried(self, peer_incarnation: str, num_bytes: int, seconds: float) -> None:
        """Count a transfer's payload, and how long it was on its way, as its sender says."""
        self.tally.carried(seconds)
        with self._lock:
            links = self._links.of_peer(peer_incarnation)
        if links:
            links[0].counts.add(num_bytes, seconds)

    def counters(self) -> HandoffCounters:
        """What was received and discarded so far."""
        return self.tally.snapshot()

    @property
    def num_links(self) -> int:
        """Links that are offered or open."""
        with self._lock:
            return len(self._links)

    def link_counts(self) -> list[LinkCounts]:
        """What each link has carried."""
        with self._lock:
            return [link.counts for link in self._links]

    @property
    def quarantined_bytes(self) -> int:
        """Staging of links that were given up, which their peers may still write to."""
        with self._lock:
            return sum(link.staging_bytes for link in self._links.given_up)

    @property
    def num_pending(self) -> int:
        """Live transfers."""
        with self._lock:
            return len(self._transfers)

    def close(self) -> None:
        """Break all links; ends live transfers with ``LinkBrokenError``."""
        with self._lock:
            self._closed = True
            links = list(self._links)
            self._watchdog.stop()
        for link in links:
            link.close()
        self._endpoint.transport.close()
        for link in links:
            link.join(2 * self.limits.io_timeout_seconds + 1)
        self._watchdog.join(self.limits.io_timeout_seconds)
        with self._lock:
            transfers = list(self._transfers.values())
        for transfer in transfers:
            self.end(transfer, LinkBrokenError("this worker's hand-off receiver was closed"))

    # What the links' threads report.

    def find(self, transfer_id: str) -> Incoming | None:
        """The live transfer with this id."""
        with self._lock:
            return self._transfers.get(transfer_id)

    def complete(self, transfer: Incoming, account: SenderAccount) -> None:
        """End a transfer that has all its tokens, with what its sender says of it."""
        transfer.account = account
        self.end(transfer, None)

    def end(self, transfer: Incoming, error: HandoffError | None) -> None:
        """End a transfer, complete if there is no error, unless somebody else has."""
        if transfer.fence():
            if error is None:
                self.tally.completed()
            self._forget(transfer)
            self._on_complete(transfer.transfer_id, transfer.num_received, error)

    def link_ended(self, link: ReceiverLink, error: HandoffError) -> None:
        """Forget a link and fail its transfers."""
        with self._lock:
            self._links.drop(link)
            ended = list(link.transfers.values())
        self._endpoint.transport.refuse(link.link_id)
        for transfer in ended:
            self.end(transfer, error)

    def forget_if_idle(self, link: ReceiverLink) -> bool:
        """Forget an offered link that nobody has connected to, unless a transfer needs it."""
        with self._lock:
            if not link.transfers:
                self._links.drop(link)
            return not link.transfers

    def _forget(self, transfer: Incoming) -> None:
        """Drop a fenced transfer, and its link if that was only kept for it."""
        unused = None
        with self._lock:
            if self._transfers.get(transfer.transfer_id) is transfer:
                del self._transfers[transfer.transfer_id]
            link = self._links.get(transfer.link_id)
            if link is not None:
                link.transfers.pop(transfer.transfer_id, None)
                if not link.transfers and not self._links.is_current(link):
                    unused = link
        if unused is not None:
            unused.close()

    def _overdue(self, transfer: Incoming) -> None:
        self.retire(transfer.link_id)
        timeout = self.limits.timeout_seconds
        self.end(transfer, HandoffError(f"{transfer.progress} in {timeout} s; timed out"))
