"""Counts each generation request once, by what its client saw, and enters it in the journal.

    stop, length   it ended as asked; of several choices, length if one was cut off
    aborted        the client left first
    busy           503
    failed         any other 5xx, or an error event in a stream
    unauthorized, unknown_model, context_length, unsupported
                   4xx, by the code of the error
    invalid        any other 4xx

Whoever writes an answer that the status does not tell the end of notes it in the ASGI scope, and so
does whoever answers with an error's code.
"""

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.deployment.http_errors import (
    ARRIVED_AT_KEY,
    ERROR_CODE_KEY,
    REQUEST_ID_KEY,
    route_path,
)
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal, OpenRequest
from antiphon.messages import TraceContext

OUTCOME_KEY = "antiphon.outcome"  # in the scope, from whoever knows more than the status
OPEN_REQUEST_KEY = "antiphon.open_request"  # the journal's ``OpenRequest``
# What clients get wrong for reasons of their own, and what somebody else would look at.
_REFUSALS = {
    "invalid_api_key": "unauthorized",
    "model_not_found": "unknown_model",
    "context_length_exceeded": "context_length",
    "unsupported_parameter": "unsupported",
}
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class RequestMetricsMiddleware:
    """Just within the request ids; plain ASGI, so that streams pass unchanged."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics, journal: Journal) -> None:
        self._app = app
        self._metrics = metrics
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or not _generates(scope):
            await self._app(scope, receive, send)
            return
        began_at, status = time.monotonic(), 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[OPEN_REQUEST_KEY] = request = self._enter(scope)
        outcome = "failed"
        try:
            await self._app(scope, receive, send_noting_status)
            outcome = scope.get(OUTCOME_KEY) or _outcome_of(status, scope)
        except asyncio.CancelledError:  # how Serve tells that the client has gone
            outcome = scope.get(OUTCOME_KEY, "aborted")
            raise
        except Exception:
            status = status or 500  # which the layer around this one answers
            raise
        finally:
            self._metrics.request_ended(outcome, time.monotonic() - began_at)
            self._journal.ended(request, outcome, status)

    def _enter(self, scope: Scope) -> OpenRequest:
        headers = Headers(scope=scope)
        context = TraceContext(
            scope[REQUEST_ID_KEY],
            headers.get("traceparent", ""),
            ",".join(headers.getlist("tracestate")),  # one list, however many headers
        )
        return self._journal.began(route_path(scope), context, scope[ARRIVED_AT_KEY])


def _generates(scope: Scope) -> bool:
    return scope["method"] == "POST" and route_path(scope) in GENERATION_PATHS


def _outcome_of(status: int, scope: Scope) -> str:
    if 400 <= status < 500:
        return _REFUSALS.get(scope.get(ERROR_CODE_KEY) or "", "invalid")
    return "busy" if status == 503 else "failed"
