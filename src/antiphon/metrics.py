"""What the metrics of every process have in common: a registry of its own, and one label, ``role``.

A quantity is counted in one kind of process only, so a sum over all targets is right; spans, which
every process makes, are counted by each for itself. Whatever has a label with a worker or a link in
it is dropped when that is gone.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (
    0.0005, 0.001, 0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
MICROSECONDS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
TOKENS = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
)  # fmt: skip
RATIOS = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)

Values = Mapping[tuple[str, ...], float]


class Buckets:
    """Observations counted by bucket, for one writing thread.

    prometheus_client's own take a lock twice for each observation and look through the buckets one
    by one, which is too much for something that happens for every token. A scrape may see an
    observation in the sum that it does not see in a bucket yet.

    Args:
        bounds: Of the buckets, rising.
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._les = [*map(floatToGoString, self._bounds), "+Inf"]
        self._children: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}

    def observe(self, value: float, *labels: str, count: int = 1) -> None:
        """Count a value, or ``count`` equal ones, under the values of some labels."""
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = ([0] * len(self._les), [0.0])
        child[0][bisect_left(self._bounds, value)] += count
        child[1][0] += value * count

    def family(self, name: str, text: str, role: str, *labels: str) -> HistogramMetricFamily:
        """What was counted; ``labels`` are the names of those that were observed."""
        family = HistogramMetricFamily(name, text, labels=["role", *labels])
        for values, (counts, total) in tuple(self._children.items()):
            cumulative = zip(self._les, accumulate(tuple(counts)), strict=True)
            family.add_metric([role, *values], list(cumulative), total[0])
        return family


class _BucketsCollector(Collector):
    def __init__(self, make_family: Callable[[], Metric]) -> None:
        self._make_family = make_family

    def collect(self) -> Iterator[Metric]:
        yield self._make_family()


class Metrics:
    """One process's metrics.

    Args:
        role: ``ingress`` or the worker's role.
    """

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self.role = role
        self._spans = self.counter(
            "antiphon_trace_spans",
            "Spans of this process that ended.",
            "outcome",
            values=("exported", "failed", "dropped"),
        )

    def counter(
        self, name: str, text: str, *labels: str, values: Iterable[str | tuple[str, ...]] = ()
    ) -> Counter:
        """Make a counter; ``name`` is without ``_total``.

        ``values`` are those of its labels that count from 0 on: Prometheus sees no increase in a
        sample that was not there before.
        """
        made = Counter(name, text, ["role", *labels], registry=self.registry)
        for value in values:
            made.labels(self.role, *((value,) if isinstance(value, str) else value))
        return made

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """Make a gauge."""
        return Gauge(name, text, ["role", *labels], registry=self.registry)

    def histogram(
        self, name: str, text: str, *labels: str, bounds: Sequence[float] = SECONDS
    ) -> Buckets:
        """Make a histogram."""
        buckets = Buckets(bounds)
        collector = _BucketsCollector(lambda: buckets.family(name, text, self.role, *labels))
        self.registry.register(collector)
        return buckets

    def spans_ended(self, outcome: str, count: int) -> None:
        """Spans were exported, failed to be, or were dropped; from any thread."""
        self._spans.labels(self.role, outcome).inc(count)

    def count(self, name: str, **labels: str) -> float:
        """Read a sample; 0 if nothing was counted under these labels."""
        return self.registry.get_sample_value(name, {"role": self.role, **labels}) or 0.0

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


def counter_family(
    name: str, text: str, labels: Sequence[str], values: Values
) -> CounterMetricFamily:
    """Counters that are read when Prometheus scrapes; ``name`` is without ``_total``."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def gauge_family(name: str, text: str, labels: Sequence[str], values: Values) -> GaugeMetricFamily:
    """Gauges that are read when Prometheus scrapes."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
