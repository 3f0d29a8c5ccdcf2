"""The counters of a worker's ends of hand-offs for Prometheus, read when it scrapes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from antiphon.metrics import Values, counter_family, gauge_family
from antiphon.workers.handoff.counters import (
    DISCARD_REASONS,
    PREWARM_REASONS,
    REFUSAL_REASONS,
    HandoffCounters,
    LinkCounts,
    total,
)


class HandoffEnd(Protocol):
    """A sender or a receiver."""

    @property
    def num_links(self) -> int:
        """Links that are offered, open or being made."""

    @property
    def quarantined_bytes(self) -> int:
        """Staging that somebody may still write to, though its link was given up."""

    def counters(self) -> HandoffCounters:
        """What it has counted."""

    def link_counts(self) -> list[LinkCounts]:
        """What each of its links has carried."""


class HandoffCollector(Collector):
    """Renders ``HandoffCounters``.

    Args:
        role: Label of every sample.
        ends: Of the worker, counted together; read from the scraping thread.
    """

    def __init__(self, role: str, ends: Sequence[HandoffEnd]) -> None:
        self._role = role
        self._ends = ends

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        counts = total(end.counters() for end in self._ends)
        for name, (text, value) in {
            "bytes": ("KV bytes sent or accepted.", counts.sent_bytes + counts.received_bytes),
            "segments": ("Segments sent or accepted.", counts.segments),
            "seconds": ("Segments were on their way over a link.", counts.seconds),
            "landing_seconds": (
                "Segments that had come were checked and written.",
                counts.landing_seconds,
            ),
            "transfers": ("Transfers that ended complete.", counts.transfers),
            "links_made": ("Links made.", counts.links_made),
            "links_prewarmed": ("Of those, before a transfer wanted them.", counts.prewarmed_links),
            "links_broken": ("Links that broke.", counts.broken_links),
        }.items():
            yield counter_family(f"antiphon_handoff_{name}", text, ["role"], self._alone(value))
        for name, text, reasons, counted in (
            (
                "discarded_segments", "Messages thrown away.",
                DISCARD_REASONS, counts.discarded_segments,
            ),
            (
                "links_refused", "Links whose ends did not go together.",
                REFUSAL_REASONS, counts.refused_links,
            ),
            (
                "prewarm_failures", "Links that could not be made before a request wanted them.",
                PREWARM_REASONS, counts.failed_prewarms,
            ),
        ):  # fmt: skip
            by_reason = {**dict.fromkeys(reasons, 0), **counted}
            samples: dict[tuple[str, ...], float] = {
                (self._role, reason): count for reason, count in by_reason.items()
            }
            yield counter_family(f"antiphon_handoff_{name}", text, ["role", "reason"], samples)
        yield from self._gauges(counts)
        yield from self._links()

    def _gauges(self, counts: HandoffCounters) -> Iterator[Metric]:
        for name, (text, value) in {
            "links": (
                "Links that are offered, open or being made.",
                sum(end.num_links for end in self._ends),
            ),
            "staging_bytes": ("Memory in which segments wait.", counts.staging_bytes),
            "quarantined_bytes": (
                "Of that, memory of links that were given up, which peers may still write to.",
                sum(end.quarantined_bytes for end in self._ends),
            ),
        }.items():
            yield gauge_family(f"antiphon_handoff_{name}", text, ["role"], self._alone(value))

    def _links(self) -> Iterator[Metric]:
        """Of two links with one peer, as while one is given up, the sum."""
        num_bytes: Counter[tuple[str, ...]] = Counter()
        seconds: dict[tuple[str, ...], float] = {}
        for link in (link for end in self._ends for link in end.link_counts()):
            key = (self._role, link.direction, link.peer)
            num_bytes[key] += link.num_bytes
            seconds[key] = seconds.get(key, 0.0) + link.seconds
        labels = ["role", "direction", "peer"]
        yield counter_family(
            "antiphon_handoff_link_bytes", "KV bytes over one link.", labels, num_bytes
        )
        yield counter_family(
            "antiphon_handoff_link_seconds", "That they were on their way.", labels, seconds
        )

    def _alone(self, value: float) -> Values:
        return {(self._role,): value}
