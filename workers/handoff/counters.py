"""What a receiver counts."""

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HandoffCounters:
    """What a receiver has seen since it started."""

    received_bytes: int  # payload bytes of accepted segments
    segments: int  # accepted
    discarded_segments: dict[str, int]  # by reason
    broken_links: int  # that had been connected, and were not closed by this worker


class Tally:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._num_segments = 0
        self._discarded: Counter[str] = Counter()
        self._num_broken_links = 0

    def segment(self, num_bytes: int) -> None:
        """Count an accepted segment."""
        with self._lock:
            self._num_segments += 1
            self._num_bytes += num_bytes

    def discarded(self, reason: str) -> None:
        """Count a message that was thrown away."""
        with self._lock:
            self._discarded[reason] += 1

    def broken_link(self) -> None:
        """Count a link that broke."""
        with self._lock:
            self._num_broken_links += 1

    def snapshot(self) -> HandoffCounters:
        """The counts so far."""
        with self._lock:
            return HandoffCounters(
                self._num_bytes,
                self._num_segments,
                dict(self._discarded),
                self._num_broken_links,
            )
