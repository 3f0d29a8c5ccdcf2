"""Worker sessions: one WebSocket between a client and a worker (protocol in ``antiphon.messages``).

A client that does not know the worker's key gets none. A peer that reads nothing for too long, or
answers no ping, loses its session; the worker then aborts that session's requests.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp
import msgspec
from aiohttp import web

from antiphon.errors import LinkBrokenError
from antiphon.listening import ANY_PORT
from antiphon.messages import (
    PROTOCOL_VERSION,
    ClientMessage,
    Hello,
    Welcome,
    WorkerCard,
    WorkerMessage,
    decode_client_message,
    decode_worker_message,
    encode,
)
from antiphon.workers.metrics_server import MetricsServer
from antiphon.workers.session_channel import Channel
from antiphon.workers.session_key import knows_key, with_key
from antiphon.workers.session_refusals import SessionRefusals

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 7.5  # a peer that answers no ping for this long is gone
_HEARTBEATS = 1.5  # of aiohttp's in that time: one until the ping, half of one for the answer
MAX_MESSAGE_BYTES = 64 * 2**20  # a prompt of a million tokens is 5 MB
_HELLO_SECONDS = 10.0
_MAX_CLOSE_REASON = 120  # bytes that fit a WebSocket's close frame


class Session(Channel):
    """A worker's end of a session."""

    def __init__(self, ws: web.WebSocketResponse, hello: Hello) -> None:
        super().__init__(ws)
        self.client_id = hello.client_id
        self.wants_telemetry = hello.wants_telemetry
        self.request_ids: set[str] = set()  # owned by whoever handles the messages


class SessionHandler(Protocol):
    """What a worker does with its sessions. Called on the event loop."""

    card: WorkerCard

    def on_opened(self, session: Session) -> None:
        """A client said hello; ``Welcome`` was queued."""

    def on_message(self, session: Session, message: ClientMessage) -> None:
        """A client asks for something."""

    def on_closed(self, session: Session) -> None:
        """The client is gone; whatever it asked for must stop."""


class SessionServer:
    """Serves ``/session``, and ``/metrics`` for Prometheus, on one port.

    Args:
        metrics: What ``/metrics`` answers, to anybody.
        session_key: What clients of ``/session`` have to know.
        on_refused: Told why a client got no session, for a counter: see ``session_refusals``.
        silence_seconds: After which a client that answers no ping is gone.
    """

    def __init__(
        self,
        metrics: Callable[[], bytes],
        session_key: str,
        on_refused: Callable[[str], None],
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._silence_seconds = silence_seconds
        self._session_key = session_key
        self._refusals = SessionRefusals(on_refused)
        self._server = MetricsServer(metrics, self._refusals.http_logger())
        self._server.app.router.add_get("/session", self._session)
        self._handler: SessionHandler | None = None
        self._sessions: set[Session] = set()

    @property
    def sessions(self) -> set[Session]:
        """Open sessions."""
        return self._sessions

    async def listen(self, host: str, ports: Sequence[int] = ANY_PORT) -> int:
        """Take the first free port; sessions are answered once ``serve`` has named a handler."""
        return await self._server.listen(host, ports)

    def serve(self, handler: SessionHandler) -> None:
        """Start answering."""
        self._handler = handler

    async def close(self) -> None:
        """Close every session and the port."""
        await asyncio.gather(*(session.close() for session in tuple(self._sessions)))
        await self._server.close()

    async def _session(self, request: web.Request) -> web.StreamResponse:
        if not knows_key(request.headers, self._session_key):
            self._refusals.note("key", f"{request.remote} does not know the key")
            return web.Response(status=401, text="a session needs the key of this worker's card")
        handler = self._handler
        if handler is None:
            return web.Response(status=503, text="this worker is still starting")
        ws = web.WebSocketResponse(
            heartbeat=self._silence_seconds / _HEARTBEATS,
            max_msg_size=MAX_MESSAGE_BYTES,
            compress=False,
        )
        await ws.prepare(request)
        hello = await self._read_hello(ws)
        if hello is not None:
            await self._converse(ws, Session(ws, hello), handler)
        return ws

    async def _converse(
        self, ws: web.WebSocketResponse, session: Session, handler: SessionHandler
    ) -> None:
        """Hand messages on until the session ends; the handler hears of that in any case."""
        self._sessions.add(session)
        session.send(Welcome(handler.card))
        try:
            handler.on_opened(session)
            async for raw in ws:
                if raw.type is aiohttp.WSMsgType.BINARY:
                    handler.on_message(session, decode_client_message(raw.data))
        except msgspec.DecodeError as error:
            logger.error("session with %s ended: unreadable message: %s", session.client_id, error)
        except Exception:
            logger.exception("session with %s ended: handling a message failed", session.client_id)
        finally:
            self._sessions.discard(session)
            session.cut()
            handler.on_closed(session)

    async def _read_hello(self, ws: web.WebSocketResponse) -> Hello | None:
        kind, reason = "protocol", f"this worker speaks protocol version {PROTOCOL_VERSION}"
        try:
            raw = await ws.receive(timeout=_HELLO_SECONDS)
            if raw.type is not aiohttp.WSMsgType.BINARY:
                return None
            hello = decode_client_message(raw.data)
            if isinstance(hello, Hello) and hello.protocol_version == PROTOCOL_VERSION:
                return hello
        except TimeoutError:
            kind, reason = "silent", f"no hello within {_HELLO_SECONDS:.0f} s"
        except msgspec.DecodeError as error:
            reason = f"{reason}; unreadable hello: {error}"
        self._refusals.note(kind, reason)
        code, message = aiohttp.WSCloseCode.PROTOCOL_ERROR, reason.encode()[:_MAX_CLOSE_REASON]
        await ws.close(code=code, message=message)
        return None


class ClientSession(Channel):
    """A client's end of a session."""

    def __init__(self, http: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(ws)
        self._http = http
        self._client_socket = ws
        self.card: WorkerCard
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        url: str,
        client_id: str,
        session_key: str,
        *,
        wants_telemetry: bool = False,
        timeout: float = 5.0,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> "ClientSession":
        """Open a session; read from it with ``start``.

        Args:
            url: In the worker's card.
            client_id: Of this process.
            session_key: In the worker's card.
            wants_telemetry: Whether the worker should report its load and cache.
            timeout: For all of it, seconds.
            silence_seconds: After which a worker that answers no ping is gone.

        Raises:
            LinkBrokenError: The worker is unreachable, too slow, has another key, or speaks another
                protocol.
        """
        http, ws = aiohttp.ClientSession(), None
        try:
            async with asyncio.timeout(timeout):
                ws = await http.ws_connect(
                    url,
                    headers=with_key(session_key),
                    heartbeat=silence_seconds / _HEARTBEATS,
                    max_msg_size=MAX_MESSAGE_BYTES,
                    compress=0,
                )
                hello = encode(Hello(PROTOCOL_VERSION, client_id, wants_telemetry))
                await ws.send_bytes(hello)
                card = _read_welcome(url, await ws.receive())
        except BaseException as error:  # cancelled, too: nothing may stay open
            await http.close()
            if ws is not None:  # has no socket any more, but still holds aiohttp's connection
                await ws.close()
            if isinstance(error, (OSError, TimeoutError, aiohttp.ClientError, msgspec.DecodeError)):
                raise LinkBrokenError(f"no session with {url}: {_explain(error)}") from error
            raise
        session = cls(http, ws)
        session.card = card
        return session

    def start(
        self, on_message: Callable[[WorkerMessage], None], on_closed: Callable[[], None]
    ) -> None:
        """Deliver messages until the session ends, then call ``on_closed`` once."""
        self._reader = asyncio.create_task(self._read(on_message, on_closed))

    async def close(self) -> None:
        """Close and wait for the reader, so that ``on_closed`` has been called."""
        await super().close()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=2.0)
        await self._http.close()

    async def _read(
        self, on_message: Callable[[WorkerMessage], None], on_closed: Callable[[], None]
    ) -> None:
        try:
            async for raw in self._client_socket:
                if raw.type is aiohttp.WSMsgType.BINARY:
                    on_message(decode_worker_message(raw.data))
        except Exception:
            logger.exception(
                "session with %s ended by a message it could not handle", self.card.url
            )
        finally:
            self.is_closed = True
            self._writer.cancel()
            try:
                on_closed()
            finally:
                await self._http.close()


def _explain(error: Exception) -> str:
    if isinstance(error, aiohttp.WSServerHandshakeError) and error.status == 401:
        return "it has another key: another worker is there now"
    return str(error) or "timed out"


def _read_welcome(url: str, raw: aiohttp.WSMessage) -> WorkerCard:
    if raw.type is not aiohttp.WSMsgType.BINARY:
        raise LinkBrokenError(f"{url} closed the session: {raw.extra or raw.data}")
    welcome = decode_worker_message(raw.data)
    if not isinstance(welcome, Welcome):
        raise LinkBrokenError(f"{url} did not say welcome")
    return welcome.card
