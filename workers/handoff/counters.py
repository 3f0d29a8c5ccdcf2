"""What the two ends of a hand-off count.

How long a segment is on its way only its sender sees, from putting it on the link until the
receiver has taken it; to the receiver it is there all at once. So a receiver is told how long the
segments of a complete transfer took (``HandoffReceiver.carried``). A segment that lands while the
next one is gathered is noticed when that is done: where copying is slower than the link, the link
looks as slow.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

DISCARD_REASONS = (
    "unknown_transfer", "duplicate", "stale_epoch", "wrong_link",
    "checksum", "size", "range", "kind",
)  # fmt: skip
REFUSAL_REASONS = ("version", "model", "layout", "dtype", "stranger")
PREWARM_REASONS = ("unreachable", "no_link", "no_answer", "refused", "broken")
_BY_REASON = ("discarded_segments", "refused_links", "failed_prewarms")


@dataclass(slots=True)
class HandoffCounters:
    """What an end has seen since it started; a sender sends, a receiver receives."""

    sent_bytes: int = 0  # payload bytes that the peers took
    received_bytes: int = 0  # payload bytes of accepted segments
    segments: int = 0  # sent, or accepted
    seconds: float = 0.0  # segments were on their way; on one link each second counts once
    landing_seconds: float = 0.0  # receiver: segments were checked and written to the cache
    transfers: int = 0  # complete
    discarded_segments: dict[str, int] = field(default_factory=dict)  # by DISCARD_REASONS
    refused_links: dict[str, int] = field(default_factory=dict)  # by REFUSAL_REASONS
    failed_prewarms: dict[str, int] = field(default_factory=dict)  # by PREWARM_REASONS
    links_made: int = 0
    prewarmed_links: int = 0  # of those, made before a transfer wanted them
    broken_links: int = 0  # that had been connected, and were neither refused nor closed here
    staging_bytes: int = 0  # held now


@dataclass(slots=True)
class LinkCounts:
    """What one link has carried, a receiver's of complete transfers; gone with the link."""

    peer: str  # replica id of the other end; where that is not known, what it was found by
    direction: str  # "sent" or "received"
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count payload, and how long it was on its way; always from the same thread."""
        self.num_bytes += num_bytes
        self.seconds += seconds


def total(counters: Iterable[HandoffCounters]) -> HandoffCounters:
    """Add up what several ends have counted."""
    counted = list(counters)
    sums: dict[str, Any] = {}
    for name in HandoffCounters.__slots__:
        values = [getattr(each, name) for each in counted]
        sums[name] = _added(values) if name in _BY_REASON else sum(values)
    return HandoffCounters(**sums)


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    added: Counter[str] = Counter()
    for each in counts:
        added.update(each)
    return dict(added)


class Tally:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = HandoffCounters()
        self._by_reason = {name: Counter[str]() for name in _BY_REASON}

    def sent(self, num_bytes: int, seconds: float) -> None:
        """Count a segment that the peer took."""
        with self._lock:
            self._counts.segments += 1
            self._counts.sent_bytes += num_bytes
            self._counts.seconds += seconds

    def segment(self, num_bytes: int, landing_seconds: float) -> None:
        """Count an accepted segment."""
        with self._lock:
            self._counts.segments += 1
            self._counts.received_bytes += num_bytes
            self._counts.landing_seconds += landing_seconds

    def carried(self, seconds: float) -> None:
        """Count how long accepted segments were on their way."""
        with self._lock:
            self._counts.seconds += seconds

    def completed(self) -> None:
        """Count a complete transfer."""
        with self._lock:
            self._counts.transfers += 1

    def discarded(self, reason: str) -> None:
        """Count a message that was thrown away."""
        with self._lock:
            self._by_reason["discarded_segments"][reason] += 1

    def refused_link(self, reason: str) -> None:
        """Count a link whose ends do not go together."""
        with self._lock:
            self._by_reason["refused_links"][reason] += 1

    def prewarm_failed(self, reason: str) -> None:
        """Count a link that could not be made before a transfer wanted it."""
        with self._lock:
            self._by_reason["failed_prewarms"][reason] += 1

    def link_made(self, *, is_prewarmed: bool) -> None:
        """Count a link whose ends have greeted each other."""
        with self._lock:
            self._counts.links_made += 1
            self._counts.prewarmed_links += is_prewarmed

    def broken_link(self) -> None:
        """Count a link that broke."""
        with self._lock:
            self._counts.broken_links += 1

    def staging_resized(self, num_bytes: int) -> None:
        """Count staging memory, taken or, if negative, let go."""
        with self._lock:
            self._counts.staging_bytes += num_bytes

    def snapshot(self) -> HandoffCounters:
        """The counts so far."""
        with self._lock:
            values = {name: getattr(self._counts, name) for name in HandoffCounters.__slots__}
            by_reason = {name: dict(counts) for name, counts in self._by_reason.items()}
            return HandoffCounters(**{**values, **by_reason})
