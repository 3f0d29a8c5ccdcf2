"""What a decode worker tries, rung by rung, for the KV of one prompt.

    ask a candidate --all arrived-------------------------------> runs, path "remote"
         |  failed: counted, logged, the peer is shunned
         +--> ask the next one, from the tokens that did arrive
         |  no candidate, attempt or time is left
         +--> compute the rest here, if not too much is queued -> runs, path "fallback"
         |  too much is queued
         +--> ask those who were passed over as shunned -------> as above
         |  they failed, too
         +--> give the blocks back and refuse as busy

Every rung is bounded: candidates and attempts in number, all of them together in time. The last
rungs take no time. ``Tries`` decides; it waits for nothing and has no clock.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from antiphon.errors import PrefillFailedError
from antiphon.messages import PrefillPeer
from antiphon.request_timing import FailedPrefill
from antiphon.tracing import attempt
from antiphon.workers.prefill_client import PrefillClient, Wanted
from antiphon.workers.prefill_outcome import Outcome
from antiphon.workers.shunned_peers import ShunnedPeers
from antiphon.workers.timeline import Handoff
from antiphon.workers.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_UNSHUNNED = {Outcome.COMPLETE, Outcome.REFUSED, Outcome.NO_LINK}  # says nothing against the peer


@dataclass(frozen=True, slots=True)
class LadderLimits:
    """Bounds of one request's way to its KV."""

    max_attempts: int = 3
    timeout_seconds: float = 60.0  # all attempts together


class Tries:
    """Which candidate of a request comes next.

    Args:
        candidates: Best first.
        shunned: Consulted at every step; others change it meanwhile.
        max_attempts: Candidates to try.
        deadline: Seconds on the clock of ``next``.
    """

    def __init__(
        self,
        candidates: Sequence[PrefillPeer],
        shunned: ShunnedPeers,
        max_attempts: int,
        deadline: float,
    ) -> None:
        self._left = list(candidates)
        self._shunned = shunned
        self._max_attempts = max_attempts
        self.deadline = deadline
        self.num_attempts = 0

    def next(self, now: float, *, even_shunned: bool = False) -> PrefillPeer | None:
        """Return whom to ask, or None if nobody is left; nobody is asked twice."""
        if self.num_attempts >= self._max_attempts or now >= self.deadline:
            return None
        for peer in self._left:
            if even_shunned or not self._shunned.is_shunned(peer.incarnation):
                self._left.remove(peer)
                self.num_attempts += 1
                return peer
        return None

    def why_nobody(self) -> PrefillFailedError:
        """Say why those who are left are shunned: as failed only if all of them are."""
        reasons = {self._shunned.why(peer.incarnation) for peer in self._left}
        for why in (Outcome.BUSY, Outcome.DRAINING):
            if why in reasons:
                return PrefillFailedError(why, f"no prefill worker was asked: {why} lately")
        return PrefillFailedError("shunned", "all prefill workers failed lately")


class Climber(Protocol):
    """Whoever owns the requests. Called on the event loop."""

    def kv_arrived(self, wanted: Wanted) -> None:
        """All KV that was wanted is in place."""

    def compute_here(self, wanted: Wanted) -> Awaitable[bool]:
        """Compute what is missing, unless too much is queued; say which."""

    def kv_unavailable(self, request_id: str, error: PrefillFailedError) -> None:
        """Every rung failed."""


class PrefillLadder:
    """Climbs for many requests at once; one task each."""

    def __init__(
        self,
        client: PrefillClient,
        shunned: ShunnedPeers,
        limits: LadderLimits,
        metrics: WorkerMetrics,
        climber: Climber,
    ) -> None:
        self._client = client
        self._shunned = shunned
        self._limits = limits
        self._metrics = metrics
        self._climber = climber
        self._climbs: dict[str, tuple[Wanted, asyncio.Task[None]]] = {}

    def start(self, wanted: Wanted, candidates: Sequence[PrefillPeer]) -> None:
        """Get the KV of a request whose blocks are reserved; the climber hears how it ended."""
        deadline = time.monotonic() + self._limits.timeout_seconds
        tries = Tries(candidates, self._shunned, self._limits.max_attempts, deadline)
        task = asyncio.create_task(self._climb(wanted, tries))
        self._climbs[wanted.request_id] = (wanted, task)

    def stop(self, request_id: str) -> None:
        """Stop for a request; on return nothing writes to its blocks. Unknown ids are ignored."""
        climb = self._climbs.pop(request_id, None)
        if climb is not None:
            wanted, task = climb
            self._client.stop(wanted)
            task.cancel()

    async def _climb(self, wanted: Wanted, tries: Tries) -> None:
        try:
            error = await self._try(wanted, tries)
            if error is not None and await self._compute_here(wanted, error):
                return
            if error is not None:
                error = await self._try(wanted, tries, error)
        finally:
            self._climbs.pop(wanted.request_id, None)
        if error is None:
            self._climber.kv_arrived(wanted)
        else:
            self._climber.kv_unavailable(wanted.request_id, error)

    async def _try(
        self, wanted: Wanted, tries: Tries, before: PrefillFailedError | None = None
    ) -> PrefillFailedError | None:
        """Ask candidates until one delivers; with an error ``before``, the shunned ones, too."""
        # Before ``next`` looks, since a penalty may end any moment; stands if it returns nobody.
        error = before or tries.why_nobody()
        even_shunned = before is not None
        # A transfer may fail at its very end, when nothing is missing any more.
        while wanted.num_missing:
            peer = tries.next(time.monotonic(), even_shunned=even_shunned)
            if peer is None:
                return error
            asked_at, num_before = time.monotonic(), wanted.num_in_place
            wanted.transfer_id = ""
            try:
                with attempt(wanted.span, "prefill attempt", peer.name) as wanted.attempt:
                    await self._client.fetch(peer, wanted, tries.deadline)
            except PrefillFailedError as foreseen:
                error = foreseen
            except Exception as unforeseen:  # the request must not wait for ever
                logger.exception("request %s: asking %s failed", wanted.request_id, peer.url)
                error = PrefillFailedError(Outcome.FAILED, repr(unforeseen))
            else:
                self._shunned.succeeded(peer.incarnation)
                self._delivered(wanted, num_before)
                return None
            seconds = time.monotonic() - asked_at
            failed = FailedPrefill(peer.name, error.outcome, seconds)
            wanted.handoff = Handoff(failed=(*wanted.handoff.failed, failed))
            self._metrics.received(wanted.num_in_place - num_before)
            self._failed(wanted, tries, peer, error)
        return None

    def _delivered(self, wanted: Wanted, num_before: int) -> None:
        self._metrics.prefill_attempt(Outcome.COMPLETE)
        self._metrics.received(wanted.num_in_place - num_before)
        if (remote := wanted.handoff.remote) is not None:
            self._metrics.transferred(remote.send, wanted.handoff.transfer_seconds)

    def _failed(
        self, wanted: Wanted, tries: Tries, peer: PrefillPeer, error: PrefillFailedError
    ) -> None:
        outcome = Outcome(error.outcome)
        if outcome is Outcome.BUSY:
            self._shunned.busy(peer.incarnation)
        elif outcome is Outcome.DRAINING:
            self._shunned.leaving(peer.incarnation)
        elif outcome not in _UNSHUNNED:
            self._shunned.failed(peer.incarnation)
        self._metrics.prefill_attempt(outcome)
        logger.warning(
            "request %s: prefill attempt %d, at %s, transfer %s, %s: %s; %d of %d tokens are still "
            "missing",
            wanted.request_id, tries.num_attempts, peer.name, wanted.transfer_id or "not begun",
            outcome, error, wanted.num_missing, len(wanted.token_ids),
        )  # fmt: skip

    async def _compute_here(self, wanted: Wanted, error: PrefillFailedError) -> bool:
        if not await self._climber.compute_here(wanted):
            return False
        self._metrics.fell_back(error.outcome)
        logger.warning(
            "request %s: computing %d tokens here: %s",
            wanted.request_id, wanted.num_missing, error.outcome,
        )  # fmt: skip
        return True
