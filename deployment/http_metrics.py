"""Counts each generation request once, by what its client saw.

    stop, length   it ended as asked; of several choices, length if one was cut off
    aborted        the client left first
    invalid        4xx
    busy           503
    failed         any other 5xx, or an error event in a stream

Whoever writes an answer that the status does not tell the end of notes it in the ASGI scope.
"""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.deployment.ingress_metrics import IngressMetrics

OUTCOME_KEY = "antiphon.outcome"  # in the scope, from whoever knows more than the status
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class RequestMetricsMiddleware:
    """The outermost layer; plain ASGI, so that streams pass unchanged."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

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

        self._metrics.request_began()
        outcome = "failed"
        try:
            await self._app(scope, receive, send_noting_status)
            outcome = scope.get(OUTCOME_KEY) or _outcome_of(status)
        except asyncio.CancelledError:  # how Serve tells that the client has gone
            outcome = scope.get(OUTCOME_KEY, "aborted")
            raise
        finally:
            self._metrics.request_ended(outcome, time.monotonic() - began_at)


def _generates(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))  # Serve's route prefix
    return scope["method"] == "POST" and path in GENERATION_PATHS


def _outcome_of(status: int) -> str:
    if 400 <= status < 500:
        return "invalid"
    return "busy" if status == 503 else "failed"
