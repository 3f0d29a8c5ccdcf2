"""Spans of requests, for OpenTelemetry.

    POST /v1/...  >  choice  >  prepare, choose, attempt                                 ingress
                                                 > decode worker  >  phases, prefill attempt
                                                                             > prefill worker

A request that is not sampled has no span: whoever holds one holds None instead, and nothing is made
or sent. Times are readings of ``time.monotonic`` of this process; what happened inside an engine
step becomes a span afterwards, on the event loop. Every span has the id of the HTTP request. None
has prompts, tokens or keys.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from antiphon.config import TracingConfig
from antiphon.messages import TraceContext
from antiphon.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = "antiphon.request_id"
WORKER = "antiphon.worker"
OUTCOME = "antiphon.outcome"

Attribute = str | int | float | bool | list[str] | None
Attributes = Mapping[str, Attribute]
_PROPAGATOR = TraceContextTextMapPropagator()
_EMPTY: Attributes = {}


class RequestSpan:
    """One span of a request, and a maker of those below it."""

    __slots__ = ("_offset_ns", "_request_id", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span, offset_ns: int, request_id: str) -> None:
        self._tracer = tracer
        self._span = span
        self._offset_ns = offset_ns  # from this process's monotonic clock to the time of day
        self._request_id = request_id

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return format_trace_id(self._span.get_span_context().trace_id)

    def context(self) -> TraceContext:
        """What another process needs to go on below this span."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        state = carrier.get("tracestate", "")
        return TraceContext(self._request_id, carrier["traceparent"], state)

    def child(
        self,
        name: str,
        began_at: float,
        attributes: Attributes = _EMPTY,
        *,
        calls_out: bool = False,
    ) -> "RequestSpan":
        """Begin a span below this one; ``calls_out`` if another process answers it."""
        span = self._tracer.start_span(
            name,
            set_span_in_context(self._span),
            SpanKind.CLIENT if calls_out else SpanKind.INTERNAL,
            start_time=self._nanoseconds(began_at),
        )
        child = RequestSpan(self._tracer, span, self._offset_ns, self._request_id)
        child.note({REQUEST_ID: self._request_id, **attributes})
        return child

    def phase(
        self, name: str, began_at: float, seconds: float, attributes: Attributes = _EMPTY
    ) -> float:
        """Make a span of something that is over; none of nothing. Return when it ended."""
        ended_at = began_at + seconds
        if seconds > 0:
            self.child(name, began_at, attributes).end(ended_at)
        return ended_at

    def note(self, attributes: Attributes) -> None:
        """Add attributes; those that are None are left out."""
        for key, value in attributes.items():
            if value is not None:
                self._span.set_attribute(key, value)

    def end(self, ended_at: float | None = None, error: str | None = None) -> None:
        """End the span; an ``error`` says in a word what went wrong.

        Args:
            ended_at: Default: now.
            error: Goes into ``error.type`` and makes the span a failed one.
        """
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        now = time.monotonic() if ended_at is None else ended_at
        self._span.end(self._nanoseconds(now))

    def _nanoseconds(self, at: float) -> int:
        return int(at * 1e9) + self._offset_ns


class Tracing:
    """Begins a process's part of a trace.

    Args:
        tracer: Decides what is sampled.
        close: Sends what is left, for a bounded time.
    """

    def __init__(self, tracer: Tracer, close: Callable[[], None]) -> None:
        self._tracer = tracer
        self.close = close

    def begin(
        self, name: str, parent: TraceContext, began_at: float, attributes: Attributes = _EMPTY
    ) -> RequestSpan | None:
        """Begin a span for what another process or a client asks; None if it is not sampled.

        Args:
            name: Of the span.
            parent: As that process said; an empty or a malformed one begins a new trace.
            began_at: On the clock of ``time.monotonic``.
            attributes: Beside the request's id.
        """
        carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
        # Only from what was sent: a span that happens to be current here has nothing to do with it.
        nothing = set_span_in_context(INVALID_SPAN)
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            _PROPAGATOR.extract(carrier, nothing),
            SpanKind.SERVER,
            start_time=int(began_at * 1e9) + offset_ns,
        )
        if not span.is_recording():
            return None
        begun = RequestSpan(self._tracer, span, offset_ns, parent.request_id)
        begun.note({REQUEST_ID: parent.request_id, **attributes})
        return begun


@contextmanager
def attempt(parent: RequestSpan | None, name: str, worker: str) -> Iterator[RequestSpan | None]:
    """A span around asking a worker; an exception's ``outcome`` says how it failed."""
    if parent is None:
        yield None
        return
    span = parent.child(name, time.monotonic(), {WORKER: worker}, calls_out=True)
    outcome = "aborted"  # unless it ends or fails: whoever waits for it is cancelled
    try:
        yield span
        outcome = "complete"
    except Exception as error:
        outcome = getattr(error, "outcome", None) or "failed"
        raise
    finally:
        span.note({OUTCOME: outcome})
        span.end(error=None if outcome in ("complete", "aborted") else str(outcome))


def effective(config: TracingConfig, environ: Mapping[str, str]) -> TracingConfig:
    """The configuration with what OpenTelemetry's variables say; its endpoint is None if it is off.

    The configuration's endpoint goes before theirs; ``OTEL_SDK_DISABLED`` goes before everything.
    """
    endpoint = config.endpoint and _with_path(config.endpoint)
    if endpoint is None and environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp":
        endpoint = _endpoint_of(environ)
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        endpoint = None
    return config.model_copy(update={"endpoint": endpoint})


def start_tracing(
    config: TracingConfig | None, role: str, replica_id: str, metrics: Metrics
) -> Tracing | None:
    """Start exporting spans, if the effective configuration has an endpoint."""
    if config is None or config.endpoint is None:
        return None
    from antiphon.tracing_export import start_exporting

    identity = {"service.instance.id": replica_id, "antiphon.role": role}
    return Tracing(*start_exporting(config, config.endpoint, identity, metrics))


def _endpoint_of(environ: Mapping[str, str]) -> str | None:
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint and (base := environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        endpoint = f"{base.rstrip('/')}/v1/traces"
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if endpoint and protocol != "http/protobuf":
        logger.warning("no spans are exported: OTLP by %s is not spoken, by HTTP it is", protocol)
        return None
    return endpoint or None


def _with_path(endpoint: str) -> str:
    bare = endpoint.rstrip("/")
    return endpoint if urlsplit(bare).path else f"{bare}/v1/traces"
