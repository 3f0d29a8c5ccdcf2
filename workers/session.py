"""Worker sessions: one WebSocket between a client and a worker (protocol in ``antiphon.messages``).

Sending never blocks: messages go to an outbox that one task drains, so a step's output is one write
and what piled up behind a slow socket leaves together. A peer that reads nothing for too long, or
answers no ping, loses its session; the worker then aborts that session's requests.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import aiohttp
import msgspec
from aiohttp import web

from antiphon.errors import LinkBrokenError
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

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0  # a peer that answers no ping for 1.5 of these is gone
MAX_MESSAGE_BYTES = 64 * 2**20  # a prompt of a million tokens is 5 MB
MAX_OUTBOX_MESSAGES = 10_000
_HELLO_SECONDS = 10.0
_CLOSE_SECONDS = 2.0
_MAX_CLOSE_REASON = 120  # bytes that fit a WebSocket's close frame

_Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class _Channel:
    """A socket with an outbox."""

    def __init__(self, ws: _Socket) -> None:
        self._socket = ws
        self._outbox: deque[bytes] = deque()
        self._has_mail = asyncio.Event()
        self._writer = asyncio.create_task(self._write())
        self.is_closed = False

    def send(self, message: Any) -> None:
        """Queue a message; dropped if the session has ended (its owner is told separately)."""
        if self.is_closed:
            return
        self._outbox.append(encode(message))
        self._has_mail.set()
        if len(self._outbox) > MAX_OUTBOX_MESSAGES:
            logger.warning("session closed: its peer has not read %d messages", len(self._outbox))
            self.cut()

    def cut(self) -> None:
        """End the session from this side, now; the reader sees the end of the socket."""
        self.is_closed = True
        self._writer.cancel()
        # Closing politely waits for a peer to read that may never do so.
        raw = self._socket.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):  # it is closed already
                raw.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Send what is queued if it goes quickly, then close."""
        self.is_closed = True
        self._has_mail.set()
        _, unsent = await asyncio.wait({self._writer}, timeout=1.0)
        if not unsent:
            with contextlib.suppress(
                TimeoutError, ConnectionError, RuntimeError, aiohttp.ClientError
            ):
                await asyncio.wait_for(self._socket.close(), _CLOSE_SECONDS)
        self.cut()

    async def _write(self) -> None:
        try:
            while not (self.is_closed and not self._outbox):
                await self._has_mail.wait()
                self._has_mail.clear()
                while self._outbox:
                    await self._socket.send_bytes(self._outbox.popleft())
        except (ConnectionError, RuntimeError, aiohttp.ClientError):
            self.is_closed = True  # the reader sees the same and tells the owner


class Session(_Channel):
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
    """Serves ``/session``, and ``/metrics`` for Prometheus, on one port."""

    def __init__(self, metrics: Callable[[], bytes]) -> None:
        self._metrics = metrics
        self._handler: SessionHandler | None = None
        self._runner: web.AppRunner | None = None
        self._sessions: set[Session] = set()

    @property
    def sessions(self) -> set[Session]:
        """Open sessions."""
        return self._sessions

    async def listen(self, host: str, port: int = 0) -> int:
        """Take a port; sessions are answered once ``serve`` has named a handler."""
        app = web.Application()
        app.router.add_get("/session", self._session)
        app.router.add_get("/metrics", self._serve_metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound: int = self._runner.addresses[0][1]
        return bound

    def serve(self, handler: SessionHandler) -> None:
        """Start answering."""
        self._handler = handler

    async def close(self) -> None:
        """Close every session and the port."""
        await asyncio.gather(*(session.close() for session in tuple(self._sessions)))
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), content_type="text/plain", charset="utf-8")

    async def _session(self, request: web.Request) -> web.StreamResponse:
        handler = self._handler
        if handler is None:
            return web.Response(status=503, text="this worker is still starting")
        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE_BYTES, compress=False
        )
        await ws.prepare(request)
        hello = await self._read_hello(ws)
        if hello is None:
            return ws
        session = Session(ws, hello)
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
        return ws

    async def _read_hello(self, ws: web.WebSocketResponse) -> Hello | None:
        reason = f"this worker speaks protocol version {PROTOCOL_VERSION}"
        try:
            raw = await ws.receive(timeout=_HELLO_SECONDS)
            if raw.type is not aiohttp.WSMsgType.BINARY:
                return None
            hello = decode_client_message(raw.data)
            if isinstance(hello, Hello) and hello.protocol_version == PROTOCOL_VERSION:
                return hello
        except TimeoutError:
            reason = f"no hello within {_HELLO_SECONDS:.0f} s"
        except msgspec.DecodeError as error:
            reason = f"{reason}; unreadable hello: {error}"
        logger.warning("a session was refused: %s", reason)
        code, message = aiohttp.WSCloseCode.PROTOCOL_ERROR, reason.encode()[:_MAX_CLOSE_REASON]
        await ws.close(code=code, message=message)
        return None


class ClientSession(_Channel):
    """A client's end of a session."""

    def __init__(self, http: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(ws)
        self._http = http
        self._client_socket = ws
        self.card: WorkerCard
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, url: str, client_id: str, *, wants_telemetry: bool = False, timeout: float = 5.0
    ) -> "ClientSession":
        """Open a session; read from it with ``start``.

        Raises:
            LinkBrokenError: The worker is unreachable, too slow, or speaks another protocol.
        """
        http, ws = aiohttp.ClientSession(), None
        try:
            async with asyncio.timeout(timeout):
                ws = await http.ws_connect(
                    url, heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE_BYTES, compress=0
                )
                hello = encode(Hello(PROTOCOL_VERSION, client_id, wants_telemetry))
                await ws.send_bytes(hello)
                card = _read_welcome(url, await ws.receive())
        except BaseException as error:  # cancelled, too: nothing may stay open
            await http.close()
            if ws is not None:  # has no socket any more, but still holds aiohttp's connection
                await ws.close()
            if isinstance(error, (OSError, TimeoutError, aiohttp.ClientError, msgspec.DecodeError)):
                reason = str(error) or "timed out"
                raise LinkBrokenError(f"no session with {url}: {reason}") from error
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


def _read_welcome(url: str, raw: aiohttp.WSMessage) -> WorkerCard:
    if raw.type is not aiohttp.WSMsgType.BINARY:
        raise LinkBrokenError(f"{url} closed the session: {raw.extra or raw.data}")
    welcome = decode_worker_message(raw.data)
    if not isinstance(welcome, Welcome):
        raise LinkBrokenError(f"{url} did not say welcome")
    return welcome.card
