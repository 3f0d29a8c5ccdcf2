"""Asks one prefill worker for the KV that a request lacks, and watches it arrive.

    fetch -> connect -> expect + Prefill -> segments ... -> all arrived
                |             |                 |
                |             |                 +-- bad segment, link broken
                |             +-- Refused, session lost, nothing for stall_seconds, out of time
                +-- unreachable                                   -> PrefillFailedError

A failed attempt leaves ``Wanted.num_in_place`` at what did arrive, without a gap, so that whoever
goes on asks, or computes, from there. Once ``fetch`` has ended, or ``stop`` has returned, nothing
writes to the request's blocks on its behalf any more: that is the receiver's fence.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from dataclasses import dataclass, field

from antiphon.errors import AntiphonError, LinkBrokenError, PrefillFailedError
from antiphon.messages import (
    Abort,
    Prefill,
    PrefillDone,
    PrefillPeer,
    Prewarm,
    RefusalKind,
    Refused,
    WorkerMessage,
)
from antiphon.request_timing import FailedPrefill, RemotePrefill
from antiphon.tracing import RequestSpan
from antiphon.workers.block_pool import BlockId
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.receiver import HandoffReceiver
from antiphon.workers.peers import Peers
from antiphon.workers.prefill_outcome import Outcome, explained, refusal
from antiphon.workers.session import ClientSession
from antiphon.workers.timeline import NO_HANDOFF, Handoff

logger = logging.getLogger(__name__)

_TICKS_PER_STALL = 4  # a stall is noticed after 1 to 1.25 times its limit


@dataclass(slots=True, eq=False)
class Wanted:
    """KV of a request: reserved here, to be computed elsewhere."""

    request_id: str
    token_ids: list[int]  # whose KV is wanted
    block_table: list[BlockId]
    num_in_place: int  # tokens, from the first, whose KV is here
    span: RequestSpan | None = None  # of the request
    attempt: RequestSpan | None = None  # of the attempt that is being made
    transfer: "_Transfer | None" = None
    transfer_id: str = ""  # of the latest attempt, for logs
    handoff: Handoff = NO_HANDOFF  # so far

    @property
    def num_missing(self) -> int:
        """Tokens whose KV is yet to come."""
        return len(self.token_ids) - self.num_in_place


@dataclass(slots=True, eq=False)
class _Transfer:
    wanted: Wanted
    transfer_id: str
    link_id: str
    peer: ClientSession
    incoming: Incoming
    ended: asyncio.Future[None]
    asked_at: float = field(default_factory=time.monotonic)
    first_token: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_token = self.wanted.num_in_place

    def end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
            self.ended.exception()  # seen, even if nobody waits any more


class PrefillClient:
    """A decode worker's way to its prefill workers. Methods run on the event loop unless noted.

    Args:
        receiver: Takes the segments.
        peers: Sessions with prefill workers.
        stall_seconds: How long an attempt may go without a segment.
    """

    def __init__(self, receiver: HandoffReceiver, peers: Peers, stall_seconds: float) -> None:
        self.receiver = receiver
        self._peers = peers
        self._stall_seconds = stall_seconds
        self._loop = asyncio.get_running_loop()
        self._transfers: dict[str, _Transfer] = {}

    async def fetch(self, peer: PrefillPeer, wanted: Wanted, deadline: float) -> None:
        """Have a peer compute and send what is missing.

        Args:
            peer: Whom to ask.
            wanted: What to ask for; ``num_in_place`` grows.
            deadline: On ``time.monotonic``'s clock.

        Raises:
            PrefillFailedError: Not everything arrived; says how it failed.
        """
        try:
            session = await self._connect(peer)
            transfer = self._ask(session, wanted)
            await self._watch(transfer, deadline)
            wanted.handoff = _delivered(transfer, peer, wanted.handoff.failed)
        except AntiphonError as error:
            raise explained(error, is_late=time.monotonic() >= deadline) from error
        finally:
            self.stop(wanted)

    async def prewarm(self, peer: PrefillPeer) -> None:
        """Open the session and the link that the first request would otherwise wait for.

        Raises:
            PrefillFailedError: The peer cannot be reached.
            LinkBrokenError: The receiver is closed.
        """
        session = await self._connect(peer)
        offer = self.receiver.prewarm(session.card.incarnation, session.card.replica_id)
        if offer is not None:
            session.send(Prewarm(offer))

    def stop(self, wanted: Wanted) -> None:
        """Fence off the transfer of a request, if it has one, and tell the peer."""
        transfer, wanted.transfer = wanted.transfer, None
        if transfer is None:
            return
        was_live = self._fence(transfer)
        # One that the receiver has just ended may have failed, and the peer would never know.
        if was_live or not transfer.ended.done():
            transfer.peer.send(Abort(transfer.transfer_id))
            transfer.ended.cancel()

    def on_transfer_ended(self, transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        """A transfer is complete or failed after ``num_tokens`` of it; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._loop.call_soon_threadsafe(self._ended, transfer_id, num_tokens, error)

    async def _connect(self, peer: PrefillPeer) -> ClientSession:
        try:
            return await self._peers.get(peer, self._on_message, self._on_lost)
        except LinkBrokenError as error:
            raise PrefillFailedError(Outcome.UNREACHABLE, str(error)) from error

    def _ask(self, session: ClientSession, wanted: Wanted) -> _Transfer:
        if session.is_closed:  # whoever was told of that did not know of this request yet
            raise LinkBrokenError("the prefill worker is gone")
        transfer_id, first_token = uuid.uuid4().hex, wanted.num_in_place
        link = self.receiver.offer(session.card.incarnation, session.card.replica_id)
        incoming = self.receiver.expect(
            transfer_id, link.link_id, wanted.block_table, first_token, len(wanted.token_ids)
        )
        ended = self._loop.create_future()
        transfer = _Transfer(wanted, transfer_id, link.link_id, session, incoming, ended)
        self._transfers[transfer_id] = wanted.transfer = transfer
        trace = wanted.attempt.context() if wanted.attempt is not None else None
        wanted.transfer_id = transfer_id
        session.send(
            Prefill(transfer_id, wanted.token_ids, first_token, link, trace, wanted.request_id)
        )
        return transfer

    async def _watch(self, transfer: _Transfer, deadline: float) -> None:
        """Wait for the transfer's end, for as long as it makes progress."""
        num_arrived, since = -1, time.monotonic()
        while not transfer.ended.done():
            now = time.monotonic()
            if now >= deadline:
                raise self._give_up(transfer, Outcome.TIMED_OUT, "no time is left")
            if (num_now := transfer.incoming.num_received) != num_arrived:
                num_arrived, since = num_now, now
            elif now - since >= self._stall_seconds:
                waited = f"nothing came for {now - since:.1f} s"
                raise self._give_up(transfer, Outcome.STALLED, waited)
            tick = min(self._stall_seconds / _TICKS_PER_STALL, deadline - now)
            await asyncio.wait({transfer.ended}, timeout=tick)
        transfer.ended.result()

    def _give_up(self, transfer: _Transfer, outcome: Outcome, why: str) -> PrefillFailedError:
        # The peer, or the way to it, may hang: whoever asks it next gets another link.
        self.receiver.retire(transfer.link_id)
        num_arrived = transfer.incoming.num_received
        return PrefillFailedError(outcome, f"{why}; {num_arrived} tokens had come")

    def _fence(self, transfer: _Transfer) -> bool:
        """Let nothing more of a transfer in; False if it has ended by itself."""
        self._transfers.pop(transfer.transfer_id, None)
        was_live = self.receiver.cancel(transfer.transfer_id)
        # Now it does not change any more, whoever has ended it.
        transfer.wanted.num_in_place = transfer.first_token + transfer.incoming.num_received
        return was_live

    def _ended(self, transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return  # stopped since
        transfer.wanted.num_in_place = transfer.first_token + num_tokens
        if error is not None:
            transfer.peer.send(Abort(transfer_id))
        transfer.end(error)

    def _on_message(self, peer: ClientSession, message: WorkerMessage) -> None:
        if isinstance(message, Refused):
            if transfer := self._transfers.get(message.request_id):
                if message.kind is RefusalKind.LINK_BROKEN:
                    # First, so that the end of its last transfer closes it.
                    self.receiver.broke(transfer.link_id, message.reason)
                self._fail(transfer, refusal(message))
        elif isinstance(message, PrefillDone):
            carried = message.num_sent_bytes, message.send_seconds
            self.receiver.carried(peer.card.incarnation, *carried)
        else:
            logger.warning("unexpected %s from a prefill worker", type(message).__name__)

    def _on_lost(self, peer: ClientSession) -> None:
        for transfer in [one for one in self._transfers.values() if one.peer is peer]:
            self._fail(transfer, LinkBrokenError("the prefill worker is gone"))
        self.receiver.leave(peer.card.incarnation)

    def _fail(self, transfer: _Transfer, error: AntiphonError) -> None:
        if self._fence(transfer):
            transfer.end(error)
        else:  # its end is on its way here, and counts
            self._transfers[transfer.transfer_id] = transfer


def _delivered(
    transfer: _Transfer, peer: PrefillPeer, failed: tuple[FailedPrefill, ...]
) -> Handoff:
    """Account for a transfer that is complete now."""
    said = transfer.incoming.account
    queue, compute = said.queue_microseconds / 1e6, said.compute_microseconds / 1e6
    age, sending = said.age_microseconds / 1e6, said.send_microseconds / 1e6
    before_first_segment = queue + compute + age - sending
    # The sender speaks before its last segments have landed, and no clock is shared. So both spans
    # end now, by this clock, and what went before is the sender's; the question's way is in them.
    elapsed = time.monotonic() - transfer.asked_at
    remote = RemotePrefill(
        worker=peer.name,
        queue=queue,
        compute=compute,
        send=max(elapsed - before_first_segment, 0.0),
        num_cached_tokens=said.num_cached_tokens,
        num_sent_tokens=transfer.incoming.num_received,
    )
    return Handoff(remote, max(elapsed - queue - compute, 0.0), failed)
