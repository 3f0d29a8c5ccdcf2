"""Prefill workers that failed, were full or stop, and are asked only when nobody else is left.

    trusted --failed--> shunned for 1 s --time--> on trial --failed--> shunned for 2, 4 ... 30 s
       ^-----------------succeeded-------------------'

Peers are known by incarnation: one that restarts is a stranger, and trusted. When a peer dies, all
its transfers fail together; that is one failure, because whoever is shunned for one fails no more.
Being full or stopping is none: why a peer is shunned is kept, so that nobody looks for a failure
where there was none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from antiphon.workers.prefill_outcome import Outcome


@dataclass(slots=True)
class _Record:
    until: float  # shunned before this time
    seconds: float  # the last penalty; the next one is twice as long
    why: Outcome  # BUSY, DRAINING, or FAILED in whatever way


class ShunnedPeers:
    """One decode worker's memory of failed peers. On one thread.

    Args:
        clock: Seconds; only differences matter.
        first_seconds: Penalty for the first failure.
        longest_seconds: Bound of the penalties, and how long after one it is remembered.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        first_seconds: float = 1.0,
        longest_seconds: float = 30.0,
    ) -> None:
        self._clock = clock
        self._first_seconds = first_seconds
        self._longest_seconds = longest_seconds
        self._records: dict[str, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def is_shunned(self, incarnation: str) -> bool:
        """Whether a peer should be asked only if nobody else is left."""
        return self.why(incarnation) is not None

    def why(self, incarnation: str) -> Outcome | None:
        """Return what a peer is shunned for, BUSY, DRAINING or FAILED; None if it is not."""
        record = self._records.get(incarnation)
        return record.why if record is not None and self._clock() < record.until else None

    def failed(self, incarnation: str) -> None:
        """Shun a peer, longer than the last time."""
        if self.why(incarnation) in (None, Outcome.BUSY):
            last = self._last_penalty(incarnation)
            seconds = min(2 * last, self._longest_seconds) if last else self._first_seconds
            self._record(incarnation, seconds, seconds, Outcome.FAILED)

    def busy(self, incarnation: str) -> None:
        """Leave a peer alone for as long as after a first failure; but this is none."""
        if not self.is_shunned(incarnation):
            last = self._last_penalty(incarnation)
            self._record(incarnation, self._first_seconds, last, Outcome.BUSY)

    def leaving(self, incarnation: str) -> None:
        """Shun a peer that will stop for as long as can be."""
        longest = self._longest_seconds
        self._record(incarnation, longest, longest, Outcome.DRAINING)

    def succeeded(self, incarnation: str) -> None:
        """Trust a peer again."""
        self._records.pop(incarnation, None)

    def _last_penalty(self, incarnation: str) -> float:
        record = self._records.get(incarnation)
        return 0.0 if record is None or self._is_old(record) else record.seconds

    def _record(self, incarnation: str, wait_seconds: float, penalty: float, why: Outcome) -> None:
        for known, record in tuple(self._records.items()):
            if self._is_old(record):
                del self._records[known]  # else every incarnation that ever failed would stay
        self._records[incarnation] = _Record(self._clock() + wait_seconds, penalty, why)

    def _is_old(self, record: _Record) -> bool:
        return record.until + self._longest_seconds < self._clock()
