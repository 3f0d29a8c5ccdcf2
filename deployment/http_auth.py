"""Asks for an API key, before anything else of the application sees a request.

    /health, /ready               open: probes and load balancers have no key
    /metrics, /metrics/targets    open, unless ``http.metrics_need_key``: numbers and addresses
    everything else               Authorization: Bearer KEY, else 401 in OpenAI's shape

Paths are named that are open, not those that are closed: a route that is added asks for a key.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from antiphon.deployment.api_keys import ApiKeys
from antiphon.deployment.http_errors import ERROR_CODE_KEY, ErrorReply, route_path

PROBE_PATHS = frozenset({"/health", "/ready"})
METRICS_PATHS = frozenset({"/metrics", "/metrics/targets"})

_MESSAGES = {
    "missing": "an API key is needed, as the header Authorization: Bearer KEY",
    "unknown": "the API key is not valid",
}


class ApiKeyMiddleware:
    """Lets those requests through that bring a key or ask for an open path."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, *, metrics_need_key: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = PROBE_PATHS if metrics_need_key else PROBE_PATHS | METRICS_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        reason = self._keys.refuses(Headers(scope=scope).get("authorization", ""))
        if reason is None:
            await self._app(scope, receive, send)
        else:
            reply = ErrorReply(401, _MESSAGES[reason], code="invalid_api_key")
            scope[ERROR_CODE_KEY] = reply.code
            await reply.response({"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return route_path(scope) in self._open
