"""Every failure in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

    RequestError, validation   400 or 404, names the parameter unless only a worker found it
    CapacityError              503 + Retry-After, from ``antiphon.router.retry_after``
    HandoffError, WorkerLost   502, without the workers' own words
    anything else              500, with the request id and nothing else

What is withheld from the client is logged under the request id. The same reply is sent as an event
when a stream has already begun.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from antiphon.errors import (
    AntiphonError,
    CapacityError,
    HandoffError,
    InvalidParameterError,
    NoWorkerError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
    UnknownRequestError,
    WorkerLostError,
)
from antiphon.router.retry_after import whole_seconds

# In the ASGI scope, set by the request id middleware.
REQUEST_ID_KEY = "antiphon.request_id"
ARRIVED_AT_KEY = "antiphon.arrived_at"  # ``time.monotonic``
ERROR_CODE_KEY = "antiphon.error_code"  # of a reply with an error, by whoever answers with it

logger = logging.getLogger(__name__)


def route_path(scope: Scope) -> str:
    """A request's path without the prefix that Serve routes by."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class ErrorReply(msgspec.Struct, frozen=True):
    """What a client is told about a failure."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_seconds: float | None = None

    @property
    def body(self) -> bytes:
        """The JSON document."""
        fields = {key: getattr(self, key) for key in ("message", "type", "param", "code")}
        return json.dumps({"error": fields}).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The whole HTTP response."""
        headers = dict(headers or {})
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(whole_seconds(self.retry_after_seconds))
        return Response(self.body, self.status, headers, "application/json")


def describe(error: Exception, request_id: str) -> ErrorReply:
    """Say what a client may know of an error, and log the rest of it."""
    if isinstance(error, RequestError):
        return _describe_request_error(error)
    if isinstance(error, CapacityError):
        is_nobody_left = isinstance(error, NoWorkerError)
        return ErrorReply(
            status=503,
            message=f"{'no worker' if is_nobody_left else 'overloaded'}, retry later: {error}",
            type="server_error",
            code="no_worker" if is_nobody_left else "overloaded",
            retry_after_seconds=error.retry_after_seconds,
        )
    if isinstance(error, (HandoffError, WorkerLostError)):
        logger.warning("request %s failed at a worker", request_id, exc_info=error)
        return ErrorReply(
            status=502,
            message=f"a worker failed while serving request {request_id}; it may be sent again",
            type="server_error",
            code="worker_failed",
        )
    logger.error("request %s failed unexpectedly", request_id, exc_info=error)
    return ErrorReply(
        status=500,
        message=f"internal error; the server's log has it under request id {request_id}",
        type="server_error",
        code="internal_error",
    )


def _describe_request_error(error: RequestError) -> ErrorReply:
    message = str(error)
    if isinstance(error, InvalidParameterError):
        return ErrorReply(400, message, param=error.parameter)
    if isinstance(error, PromptTooLongError):
        return ErrorReply(400, message, param=error.parameter, code="context_length_exceeded")
    if isinstance(error, UnknownModelError):
        return ErrorReply(404, message, param="model", code="model_not_found")
    if isinstance(error, UnknownRequestError):
        return ErrorReply(404, message, param="request_id", code=error.CODE)
    return ErrorReply(400, message)


def describe_validation(errors: Sequence[Mapping[str, Any]]) -> ErrorReply:
    """Turn what pydantic found first into a reply that names the parameter."""
    first = errors[0]
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        where = f"{context.get('error', 'unreadable')} at character {first['loc'][-1]}"
        return ErrorReply(400, f"the request body is not valid JSON: {where}")
    path = context.get("param") or _path(first["loc"][1:])
    if not path:
        return ErrorReply(
            400, "the request body must be a JSON object sent as Content-Type: application/json"
        )
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {path}"
        return ErrorReply(400, message, param=path, code="unknown_parameter")
    if first["type"] == "missing":
        return ErrorReply(400, f"{path}: is required", param=path, code="missing_parameter")
    message = str(context.get("error", first["msg"]))
    message = f"{path}: {message[:1].lower()}{message[1:]}"
    code = first["type"] if first["type"] == "unsupported_parameter" else None
    return ErrorReply(400, message, param=path, code=code)


def _path(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _answer(request: Request, reply: ErrorReply) -> Response:
    request.scope[ERROR_CODE_KEY] = reply.code
    return reply.response()


def add_error_handlers(app: FastAPI) -> None:
    """Answer everything that goes wrong in an application in OpenAI's shape."""

    @app.exception_handler(AntiphonError)
    async def on_antiphon_error(request: Request, error: AntiphonError) -> Response:
        return _answer(request, describe(error, request.scope[REQUEST_ID_KEY]))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return _answer(request, describe_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return ErrorReply(error.status_code, message, type=kind).response(error.headers)
