"""Spans on their way to a collector: sent, failed, dropped, counted; and when there is none."""

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from collector import Collector, collecting

from antiphon import tracing_export
from antiphon.config import TracingConfig
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import TraceContext
from antiphon.tracing import Tracing, effective, start_tracing


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        yield collector


def config_for(collector: Collector, **more: Any) -> TracingConfig:
    return effective(TracingConfig(endpoint=collector.url, **more), {})


def spans_of(metrics: IngressMetrics, outcome: str) -> float:
    return metrics.count("antiphon_trace_spans_total", outcome=outcome)


def make_spans(tracing: Tracing | None, count: int) -> None:
    assert tracing is not None
    for _ in range(count):
        span = tracing.begin("s", TraceContext("r"), time.monotonic())
        assert span is not None
        span.end()


def wait_for_spans(metrics: IngressMetrics, outcome: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while spans_of(metrics, outcome) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_unreachable_collector_is_logged_once_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    with socket.socket() as bound:  # but nobody listens
        bound.bind(("127.0.0.1", 0))
        config = TracingConfig(endpoint=f"http://127.0.0.1:{bound.getsockname()[1]}/v1/traces")
        metrics = IngressMetrics()
        tracing = start_tracing(config, "ingress", "i0", metrics)
        with caplog.at_level(logging.INFO):
            for count in (1, 2, 3):
                make_spans(tracing, 1)
                wait_for_spans(metrics, "failed", count)
            assert tracing is not None
            began_at = time.monotonic()
            tracing.close()
            assert time.monotonic() - began_at < 5
    assert spans_of(metrics, "failed") == 3
    # The exporter would log every batch; what it says goes to nobody else.
    assert not logging.getLogger(tracing_export._EXPORTER_LOGGER).propagate
    (line,) = [r.getMessage() for r in caplog.records if r.name == tracing_export.__name__]
    assert "spans cannot be exported to http://127.0.0.1:" in line
    assert line.endswith(": Failed to export spans batch due to timeout, max retries or shutdown.")


def test_a_collector_that_comes_back_gets_spans_again(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400  # an answer that is not tried again
    metrics = IngressMetrics()
    tracing = start_tracing(config_for(collector), "ingress", "i0", metrics)
    with caplog.at_level(logging.INFO):
        make_spans(tracing, 1)
        wait_for_spans(metrics, "failed", 1)
        collector.status = 200
        make_spans(tracing, 1)
        wait_for_spans(metrics, "exported", 1)
    assert tracing is not None
    tracing.close()
    assert [r.message for r in caplog.records if "again" in r.message]
    assert len(collector.spans) == 1


def test_what_the_queue_cannot_hold_is_dropped_and_counted(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    metrics = IngressMetrics()
    tracing = start_tracing(config_for(collector), "ingress", "i0", metrics)
    # The exporter may take batches meanwhile; what it took and what was dropped is everything.
    make_spans(tracing, 500)
    assert tracing is not None
    tracing.close()
    exported, dropped = spans_of(metrics, "exported"), spans_of(metrics, "dropped")
    assert exported == len(collector.spans) >= 8
    assert dropped == 500 - exported > 0


# Configuration.


@pytest.mark.parametrize(
    ("own", "environ", "endpoint"),
    [
        (None, {}, None),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        ("http://c/otlp", {}, "http://c/otlp"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4318/"}, "http://e:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e/x"}, "http://e/x"),
        ("http://c:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e"}, "http://c:1/v1/traces"),
        ("http://c:1", {"OTEL_SDK_DISABLED": "true"}, None),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e", "OTEL_TRACES_EXPORTER": "none"},
            None,
        ),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            None,
        ),
    ],
)
def test_where_spans_go(own: str | None, environ: dict[str, str], endpoint: str | None) -> None:
    assert effective(TracingConfig(endpoint=own), environ).endpoint == endpoint


def test_nothing_is_started_and_no_exporter_loaded_without_an_endpoint() -> None:
    code = (
        "import sys; from antiphon.config import TracingConfig;"
        "from antiphon.deployment.ingress_metrics import IngressMetrics;"
        "from antiphon.tracing import start_tracing;"
        "assert start_tracing(TracingConfig(), 'ingress', 'i', IngressMetrics()) is None;"
        "loaded = [m for m in sys.modules if m.startswith(('opentelemetry.exporter',"
        " 'opentelemetry.sdk', 'requests'))];"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_environment_may_name_the_service_and_choose_the_sampler(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    tracing = start_tracing(config_for(collector), "ingress", "i0", IngressMetrics())
    make_spans(tracing, 1)
    assert tracing is not None
    tracing.close()
    (span,) = collector.spans
    assert span.resource["service.name"] == "chat"
    assert span.resource["deployment.environment"] == "test"

    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracing = start_tracing(config_for(collector), "ingress", "i0", IngressMetrics())
    assert tracing is not None
    assert tracing.begin("s", TraceContext("r"), 0.0) is None
    tracing.close()
