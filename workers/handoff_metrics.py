"""The counters of a worker's ends of hand-offs for Prometheus, read when it scrapes."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from antiphon.workers.handoff.counters import HandoffCounters, total


class HandoffEnd(Protocol):
    """A sender or a receiver."""

    @property
    def num_links(self) -> int:
        """Links that are offered, open or being made."""

    def counters(self) -> HandoffCounters:
        """What it has counted."""


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
        """Yield one family per counter, then the gauges."""
        counts = total(end.counters() for end in self._ends)
        totals = {
            "bytes": ("KV bytes sent or accepted.", counts.sent_bytes + counts.received_bytes),
            "segments": ("Segments sent or accepted.", counts.segments),
            "seconds": ("Time that links were busy with segments.", counts.seconds),
            "transfers": ("Transfers that ended complete.", counts.transfers),
            "tail_seconds": (
                "From a prompt's last step to its transfer's end.",
                counts.tail_seconds,
            ),
            "links_made": ("Links made.", counts.links_made),
            "links_prewarmed": ("Of those, before a transfer wanted them.", counts.prewarmed_links),
            "links_broken": ("Links that broke.", counts.broken_links),
        }
        for name, (text, value) in totals.items():
            family = CounterMetricFamily(f"antiphon_handoff_{name}", text, labels=["role"])
            family.add_metric([self._role], value)
            yield family
        discarded = CounterMetricFamily(
            "antiphon_handoff_discarded_segments",
            "Messages thrown away.",
            labels=["role", "reason"],
        )
        for reason, value in counts.discarded_segments.items():
            discarded.add_metric([self._role, reason], value)
        yield discarded
        num_links = sum(end.num_links for end in self._ends)
        gauges = {
            "links": ("Links that are offered, open or being made.", num_links),
            "staging_bytes": ("Memory in which segments wait.", counts.staging_bytes),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"antiphon_handoff_{name}", text, labels=["role"])
            gauge.add_metric([self._role], value)
            yield gauge
