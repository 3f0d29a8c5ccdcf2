"""Sends spans to a collector by OTLP over HTTP; loaded only where tracing is configured.

    span ended -> bounded queue -> batch, on a thread of its own -> collector
                       | full                    | refused, unreachable
                       +--> dropped, counted     +--> failed, counted; logged when it begins

Nothing waits for the collector. The exporter tries a batch for ``OTEL_EXPORTER_OTLP_TIMEOUT``
seconds, 10 by default, while the queue fills; ``OTEL_BSP_*`` sets queue and batches.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from antiphon import __version__
from antiphon.config import TracingConfig
from antiphon.metrics import Metrics

logger = logging.getLogger(__name__)

_EXPORTER_LOGGER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_MAX_QUEUED_SPANS = 2048  # the SDK's own default
_CLOSE_SECONDS = 3.0
_GIVE_UP_SECONDS = 0.5


class _FirstWords(logging.Handler):
    """Keeps what the exporter would log of each batch, so that it can be said once.

    The first line of a batch has the reason; what follows says that trying again did not help.
    """

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


class CountingExporter(SpanExporter):
    """Counts what becomes of spans, and says when a collector stops and starts to take them.

    Args:
        inner: Sends them.
        endpoint: Where to, for the log.
        metrics: Of this process.
    """

    def __init__(self, inner: SpanExporter, endpoint: str, metrics: Metrics) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._metrics = metrics
        self._is_failing = False
        self._first_words = _FirstWords()
        exporter_logger = logging.getLogger(_EXPORTER_LOGGER)
        exporter_logger.addHandler(self._first_words)
        exporter_logger.propagate = False
        self.num_taken = 0  # written by the exporting thread alone

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; on the exporting thread."""
        self.num_taken += len(spans)
        self._first_words.text = ""
        try:
            result = self._inner.export(spans)
        except Exception as error:
            self._first_words.text = repr(error)
            result = SpanExportResult.FAILURE
        is_failing = result is not SpanExportResult.SUCCESS
        self._metrics.spans_ended("failed" if is_failing else "exported", len(spans))
        if is_failing and not self._is_failing:
            logger.warning(
                "spans cannot be exported to %s and are lost until they can: %s",
                self._endpoint, self._first_words.text,
            )  # fmt: skip
        elif self._is_failing and not is_failing:
            logger.info("spans are exported to %s again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        """Give up what is being tried; what comes after that fails at once."""
        self._inner.shutdown()


class BoundedProcessor(SpanProcessor):
    """A batch processor whose losses are counted; spans end on one thread.

    Args:
        exporter: Where they go.
        max_queued_spans: More wait for the exporter nowhere.
        metrics: Of this process.
    """

    def __init__(self, exporter: CountingExporter, max_queued_spans: int, metrics: Metrics) -> None:
        self._exporter = exporter
        self._max_queued_spans = max_queued_spans
        self._metrics = metrics
        self._num_offered = 0
        self._batches = BatchSpanProcessor(exporter, max_queue_size=max_queued_spans)

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span, or drop it; never waits."""
        if self._num_offered - self._exporter.num_taken >= self._max_queued_spans:
            self._metrics.spans_ended("dropped", 1)
            return
        self._num_offered += 1
        self._batches.on_end(span)

    def shutdown(self) -> None:
        """Send what is queued, for a bounded time; the rest is dropped."""
        closing = threading.Thread(target=self._batches.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            self._exporter.shutdown()
            closing.join(_GIVE_UP_SECONDS)
        num_left = self._num_offered - self._exporter.num_taken
        if num_left:
            self._metrics.spans_ended("dropped", num_left)
            logger.warning("%d spans were not exported before the end", num_left)


def start_exporting(
    config: TracingConfig, endpoint: str, identity: Mapping[str, str], metrics: Metrics
) -> tuple[Tracer, Callable[[], None]]:
    """Start the exporting thread; return what makes spans, and what ends the thread in time.

    Args:
        config: What is sampled.
        endpoint: Where spans go, with its path.
        identity: Attributes of this process.
        metrics: Where spans are counted.
    """
    exporter = CountingExporter(OTLPSpanExporter(endpoint), endpoint, metrics)
    # As the SDK itself does, which does not tell what it found.
    wanted = os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, "")
    max_queued_spans = int(wanted) if wanted.isdigit() and int(wanted) else _MAX_QUEUED_SPANS
    resource = Resource.create({"service.version": __version__, **identity})
    if str(resource.attributes.get("service.name", "unknown")).startswith("unknown"):
        resource = resource.merge(Resource({"service.name": "antiphon"}))
    # What a client says of sampling holds. Without a ratio the SDK's own variables decide.
    ratio = config.sample_ratio
    sampler = None if ratio is None else ParentBased(TraceIdRatioBased(ratio))
    # At exit the SDK would wait for half a minute; whoever made this closes it.
    provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
    provider.add_span_processor(BoundedProcessor(exporter, max_queued_spans, metrics))
    return provider.get_tracer("antiphon", __version__), provider.shutdown
