"""Prefill workers that failed lately, and are asked only when nobody else is left.

    trusted --failed--> shunned for 1 s --time--> on trial --failed--> shunned for 2, 4 ... 30 s
       ^-----------------succeeded-------------------'

Peers are known by incarnation: one that restarts is a stranger, and trusted. When a peer dies, all
its transfers fail together; that is one failure, because whoever is shunned already fails no more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Record:
    until: float  # shunned before this time
    seconds: float  # the last penalty; the next one is twice as long


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
        record = self._records.get(incarnation)
        return record is not None and self._clock() < record.until

    def failed(self, incarnation: str) -> None:
        """Shun a peer, longer than the last time."""
        if self.is_shunned(incarnation):
            return
        record = self._records.get(incarnation)
        seconds = self._first_seconds
        if record is not None and record.seconds:
            seconds = min(2 * record.seconds, self._longest_seconds)
        self._record(incarnation, seconds, seconds)

    def busy(self, incarnation: str) -> None:
        """Leave a peer alone for as long as after a first failure; but this is none."""
        if not self.is_shunned(incarnation):
            record = self._records.get(incarnation)
            self._record(incarnation, self._first_seconds, record.seconds if record else 0.0)

    def leaving(self, incarnation: str) -> None:
        """Shun a peer that will stop for as long as can be."""
        self._record(incarnation, self._longest_seconds, self._longest_seconds)

    def succeeded(self, incarnation: str) -> None:
        """Trust a peer again."""
        self._records.pop(incarnation, None)

    def _record(self, incarnation: str, wait_seconds: float, penalty_seconds: float) -> None:
        now = self._clock()
        for known, record in tuple(self._records.items()):
            if record.until + self._longest_seconds < now:
                del self._records[known]  # else every incarnation that ever failed would stay
        self._records[incarnation] = _Record(now + wait_seconds, penalty_seconds)
