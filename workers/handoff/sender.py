"""The prefill worker's end: sends the KV of open transfers while later tokens are computed.

A transfer is a range of tokens of which a growing part is computed. ``push`` only moves the end of
that part, so the engine never waits and nothing queues up: when a link is slower than the engine,
pushes merge into larger segments. On a link the oldest transfer with something to send goes first.

    open ─▶ sending ─finish, all sent─▶ END   ─▶ on_done(None)
               ├────abort─────────────▶ ABORT ─▶ on_done(HandoffError)
               └────link breaks───────────────▶ on_done(LinkBrokenError)
"""

import threading
from collections.abc import Callable, Sequence

from antiphon.errors import HandoffError, LinkBrokenError, WorkerBusyError
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.counters import HandoffCounters, LinkCounts, Tally
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.link_log import LinkLog
from antiphon.workers.handoff.outgoing import NOT_TOLD, Computed, Outgoing
from antiphon.workers.handoff.segment import MAX_PAYLOAD_BYTES
from antiphon.workers.handoff.sender_link import SenderLimits, SenderLink
from antiphon.workers.handoff.staging import streams_for

__all__ = ["HandoffSender", "SenderLimits"]

OnDone = Callable[[str, HandoffError | None, int, float], None]


class HandoffSender:
    """Sends transfers to any number of receivers.

    Args:
        endpoint: This worker's end.
        limits: Bounds.
        on_done: Called with (transfer id, error, payload bytes sent, seconds the link was busy with
            them) exactly once per opened transfer, from a link's thread or from ``close``. It must
            not raise and must not block. Until then the caller keeps the transfer's blocks alive.
    """

    def __init__(self, endpoint: Endpoint, limits: SenderLimits, on_done: OnDone) -> None:
        bytes_per_token = endpoint.store.num_bytes_per_token
        if not bytes_per_token <= max(limits.segment_bytes, bytes_per_token) <= MAX_PAYLOAD_BYTES:
            raise ValueError(
                f"segment_bytes {limits.segment_bytes} and the {bytes_per_token} KV bytes of one "
                f"token must not exceed {MAX_PAYLOAD_BYTES}"
            )
        self._endpoint = endpoint
        self._limits = limits
        self._on_done = on_done
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], SenderLink] = {}  # least recently used first
        self._transfers: dict[str, SenderLink] = {}
        self._streams = streams_for(endpoint.store.device)
        self._tally = Tally()
        self._log = LinkLog()
        self._closed = False

    def open(self, transfer_id: str, offer: LinkOffer, first_token: int) -> None:
        """Begin a transfer; the link is made on its first use, in the background.

        Args:
            transfer_id: 32 hex digits.
            offer: From the receiver.
            first_token: First token to send.

        Raises:
            WorkerBusyError: All links are in use, or no thread can be started for another; nothing
                was opened.
            LinkBrokenError: The sender is closed.
        """
        unused: list[SenderLink] = []
        try:
            with self._lock:
                self._check_open()
                if transfer_id in self._transfers:
                    raise ValueError(f"transfer {transfer_id} is open already")
                key = (offer.address, offer.link_id)
                link = self._links.pop(key, None)
                if link is None:
                    unused = self._let_go(offer.receiver_incarnation) or self._make_room()
                    link = self._new_link(offer)
                self._links[key] = link
                self._transfers[transfer_id] = link
                link.add(Outgoing(transfer_id, first_token, first_token))
        finally:  # nobody else knows of them, whatever became of the new one
            for each in unused:
                each.close()

    def prewarm(self, offer: LinkOffer) -> None:
        """Make a link before a transfer wants it, in the background.

        Raises:
            WorkerBusyError: No link more is allowed; none is given up for one that may be wanted.
                Or no thread can be started for it.
            LinkBrokenError: The sender is closed.
        """
        unused: list[SenderLink] = []
        try:
            with self._lock:
                self._check_open()
                key = (offer.address, offer.link_id)
                if key in self._links:
                    return
                unused = self._let_go(offer.receiver_incarnation)
                if len(self._links) >= self._limits.max_links:
                    num_links = self._limits.max_links
                    raise WorkerBusyError(f"{num_links} hand-off links are open already")
                self._links[key] = self._new_link(offer)
        finally:
            for each in unused:
                each.close()

    def leave(self, receiver_incarnation: str) -> None:
        """Give up the links to a receiver that is lost, each with the end of its last transfer.

        Where packets vanish, nothing else ends a link. Transfers must have been aborted: what the
        receiver has not read yet is lost.
        """
        with self._lock:
            unused = self._let_go(receiver_incarnation)
        for each in unused:
            each.close()

    def push(self, transfer_id: str, block_table: Sequence[int], start: int, end: int) -> None:
        """Say that KV of tokens ``[start, end)`` is computed; on the engine's thread, never blocks.

        Harmless if the transfer has ended. ``start`` is where the last push ended.
        """
        mark = self._streams.mark()
        with self._lock:
            if link := self._transfers.get(transfer_id):
                link.push(transfer_id, block_table, (start, end), mark)

    def finish(self, transfer_id: str, computed: Computed = NOT_TOLD) -> None:
        """Say that everything was pushed, and how it came about; harmless if it has ended."""
        with self._lock:
            if link := self._transfers.get(transfer_id):
                link.finish(transfer_id, computed)

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give a transfer up and tell the receiver why; harmless if the transfer has ended."""
        with self._lock:
            if link := self._transfers.get(transfer_id):
                link.abort(transfer_id, reason)

    def counters(self) -> HandoffCounters:
        """What was sent so far."""
        return self._tally.snapshot()

    @property
    def num_links(self) -> int:
        """Links that are open or being made."""
        with self._lock:
            return len(self._links)

    def link_counts(self) -> list[LinkCounts]:
        """What each link has carried."""
        with self._lock:
            return [link.counts for link in self._links.values()]

    @property
    def quarantined_bytes(self) -> int:
        """None: nobody else writes to a sender's staging."""
        return 0

    def close(self) -> None:
        """Break all links; ends open transfers with ``LinkBrokenError``."""
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        for link in links:
            link.close()
        for link in links:
            link.join()
        self._endpoint.transport.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LinkBrokenError("this worker's hand-off sender is closed")

    def _new_link(self, offer: LinkOffer) -> SenderLink:
        link = SenderLink(self._endpoint, self._limits, offer, self._tally, self._log)
        try:
            link.start(self._lock, self._end)
        except RuntimeError as error:  # the pod's bound of threads is reached
            raise WorkerBusyError(f"no hand-off link can be started: {error}") from error
        return link

    def _let_go(self, receiver_incarnation: str) -> list[SenderLink]:
        """Leave the links to a receiver, which offers one at a time: it has left these.

        Those in use end with their last transfer. The idle ones are out, for the caller to close.
        """
        idle = []
        for key, link in list(self._links.items()):
            if link.offer.receiver_incarnation == receiver_incarnation:
                link.is_left = True
                if link.is_idle:
                    idle.append(self._links.pop(key))
        return idle

    def _make_room(self) -> list[SenderLink]:
        if len(self._links) < self._limits.max_links:
            return []
        for key, link in self._links.items():
            if link.is_idle:
                return [self._links.pop(key)]
        raise WorkerBusyError(f"all {len(self._links)} hand-off links of this worker are in use")

    def _end(self, link: SenderLink, transfer: Outgoing | None, error: HandoffError | None) -> None:
        with self._lock:
            ended = [transfer] if transfer else list(link.transfers.values())
            for each in ended:
                del self._transfers[each.transfer_id]
                del link.transfers[each.transfer_id]
            key = (link.offer.address, link.offer.link_id)
            is_unused = link.is_left and link.is_idle
            if (transfer is None or is_unused) and self._links.get(key) is link:
                del self._links[key]
        for each in ended:
            self._on_done(each.transfer_id, error, each.num_bytes, each.busy_seconds)
        if is_unused:
            link.close()
