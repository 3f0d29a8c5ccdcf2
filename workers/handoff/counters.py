"""What the two ends of a hand-off count.

How long a segment is on its way only its sender sees, from putting it on the link until the receiver
has taken it; to the receiver it is there all at once. So a receiver is told how long the segments of
a complete transfer took (``HandoffReceiver.carried``). A segment that lands while the next one is
gathered is noticed when that is done: where copying is slower than the link, the link looks as slow.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

DISCARD_REASONS = (
    "unknown_transfer", "duplicate", "stale_epoch", "wrong_link",
    "checksum", "size", "range", "kind",
)  # fmt: skip


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
    links_made: int = 0
    prewarmed_links: int = 0  # of those, made before a transfer wanted them
    broken_links: int = 0  # that had been connected, and were not closed by this worker
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
    discarded: Counter[str] = Counter()
    for each in counted:
        discarded.update(each.discarded_segments)
    names = [name for name in HandoffCounters.__slots__ if name != "discarded_segments"]
    sums = {name: sum(getattr(each, name) for each in counted) for name in names}
    return HandoffCounters(**sums, discarded_segments=dict(discarded))


class Tally:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = HandoffCounters()
        self._discarded: Counter[str] = Counter()

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
            self._discarded[reason] += 1

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
            return HandoffCounters(**{**values, "discarded_segments": dict(self._discarded)})
