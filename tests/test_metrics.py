"""Our histograms say what prometheus_client's would."""

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from antiphon.metrics import SECONDS, Metrics


def test_a_histogram_is_rendered_as_prometheus_client_does() -> None:
    ours = Metrics("decode")
    buckets = ours.histogram("x_seconds", "Help.", "kind")
    registry = CollectorRegistry()
    theirs = Histogram("x_seconds", "Help.", ["role", "kind"], registry=registry, buckets=SECONDS)
    rng = random.Random(0)
    for value in (*SECONDS, 0.0, 100.0, *(rng.lognormvariate(-3, 3) for _ in range(200))):
        kind = rng.choice("ab")
        buckets.observe(value, kind)
        theirs.labels("decode", kind).observe(value)

    def samples(text: bytes) -> dict[str, float]:
        # What a process counts once, such as spans, is rendered too.
        lines = [line for line in text.decode().splitlines() if line.startswith("x_seconds")]
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if "_created" not in line)
        }

    expected = samples(generate_latest(registry))
    assert len(expected) == 2 * (len(SECONDS) + 3)
    assert samples(ours.render()) == pytest.approx(expected)


def test_equal_values_can_be_counted_at_once() -> None:
    metrics = Metrics("decode")
    buckets = metrics.histogram("x_seconds", "Help.")
    buckets.observe(0.5, count=3)
    assert metrics.count("x_seconds_count") == 3
    assert metrics.count("x_seconds_sum") == 1.5
    assert metrics.count("x_seconds_bucket", le="0.3") == 0
    assert metrics.count("x_seconds_bucket", le="0.5") == 3
