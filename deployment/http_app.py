"""The OpenAI-compatible endpoint as an ASGI application.

    POST /v1/chat/completions, /v1/completions     answered by ``CompletionResponse``
    GET  /v1/models, /v1/models/{id}
    GET  /health    200 while the process lives
    GET  /ready     200 when requests can be served, else 503 with the reason

Nothing here depends on the server that calls it: Ray Serve, uvicorn and tests do. The middleware is
plain ASGI, because Starlette's BaseHTTPMiddleware hides disconnects from streams.
"""

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon import __version__
from antiphon.deployment.backend import Backend, Tokenizer
from antiphon.deployment.http_completion import CompletionResponse, Service
from antiphon.deployment.http_errors import (
    ARRIVED_AT_KEY,
    REQUEST_ID_KEY,
    add_error_handlers,
    describe,
)
from antiphon.deployment.http_generation import Slots
from antiphon.deployment.http_metrics import RequestMetricsMiddleware
from antiphon.deployment.http_planning import Planner
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal
from antiphon.deployment.openai_api import ChatCompletionRequest, CompletionRequest
from antiphon.errors import UnknownModelError

_MAX_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:-]")


Guard = Callable[[ASGIApp], ASGIApp]


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    *,
    max_concurrent_requests: int,
    metrics: IngressMetrics | None = None,
    journal: Journal | None = None,
    guard: Guard | None = None,
    server_returns_ids: bool = False,
) -> FastAPI:
    """Make the application.

    Args:
        backend: Generates; used from the event loop that serves the application.
        tokenizer: Of the backend's model.
        max_concurrent_requests: Choices that may be generated at once; a request with ``n`` choices
            counts as ``n``. Further ones get 503.
        metrics: Where requests are counted; None: nowhere that anybody reads.
        journal: Where requests are remembered; None: nowhere.
        guard: Stands before every route and decides who passes; None lets everybody pass.
        server_returns_ids: Whether X-Request-Id is in answers already by whoever calls the
            application, as it is with Serve.
    """
    metrics = metrics or IngressMetrics()
    app = FastAPI(title="Antiphon", version=__version__, strict_content_type=False)
    if guard is not None:
        app.add_middleware(guard)
    app.add_middleware(RequestMetricsMiddleware, metrics=metrics, journal=journal or Journal())
    # Around the others, which need the id.
    app.add_middleware(RequestIdMiddleware, is_returned=not server_returns_ids)
    add_error_handlers(app)
    service = Service(Planner(backend, tokenizer), Slots(max_concurrent_requests), metrics)
    _add_completion_routes(app, service)
    _add_model_routes(app, backend)
    _add_probe_routes(app, backend)
    return app


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        return CompletionResponse(service, body)

    @app.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest) -> Response:
        return CompletionResponse(service, body)


def _add_model_routes(app: FastAPI, backend: Backend) -> None:
    created = int(time.time())

    def model_card() -> dict[str, Any]:
        return {
            "id": backend.model_name,
            "object": "model",
            "created": created,
            "owned_by": "antiphon",
            "max_model_len": backend.max_context_tokens,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> dict[str, Any]:
        if model != backend.model_name:
            raise UnknownModelError(model, backend.model_name)
        return model_card()


def _add_probe_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        is_ready, reason = backend.is_ready()
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status, "reason": reason}, 200 if is_ready else 503)


class RequestIdMiddleware:
    """Gives each request an id, returns it in X-Request-Id, and answers what nobody caught.

    Serve wraps every server that it starts in a middleware that puts an id into requests without
    one, and adds that header to answers: a second one would be the same.
    """

    def __init__(self, app: ASGIApp, *, is_returned: bool) -> None:
        self._app = app
        self._is_returned = is_returned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = clean_request_id(wanted) or secrets.token_hex(16)
        scope[REQUEST_ID_KEY], scope[ARRIVED_AT_KEY] = request_id, time.monotonic()
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                if self._is_returned:
                    header = (b"x-request-id", request_id.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if is_started:  # too late for a status; the server closes the connection
                raise
            await describe(error, request_id).response()(scope, receive, send_with_id)


def clean_request_id(wanted: str) -> str:
    """Keep what is safe of the client's id, which reaches logs, headers and workers; or nothing."""
    return _NOT_IN_REQUEST_ID.sub("", wanted)[:_MAX_REQUEST_ID]
