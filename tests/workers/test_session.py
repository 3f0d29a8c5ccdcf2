"""A session tells both ends of its end, whatever goes wrong, and within a bound."""

import asyncio
import base64
import gc
import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import uvloop
from pools import until

from antiphon.errors import LinkBrokenError
from antiphon.messages import (
    PROTOCOL_VERSION,
    Abort,
    ClientMessage,
    Hello,
    PrefillPeer,
    Refused,
    Role,
    Welcome,
    WorkerCard,
    WorkerMessage,
    decode_worker_message,
    encode,
)
from antiphon.workers import session as session_module
from antiphon.workers import session_channel
from antiphon.workers.peers import Peers
from antiphon.workers.session import ClientSession, Session, SessionServer
from antiphon.workers.session_key import new_session_key, with_key

KEY = "k3y-of-the-worker"
CARD = WorkerCard("r", "inc", Role.DECODE, "ws://x", "m", 16, 8, 128, 4, 4, 1, "node")


class Handler:
    """Echoes aborts as refusals and keeps what it sees."""

    card = CARD

    def __init__(self) -> None:
        self.opened: list[Session] = []
        self.closed: list[Session] = []
        self.refused: list[str] = []
        self.messages: list[ClientMessage] = []
        self.on_abort: Callable[[Session, str], None] = lambda session, request_id: session.send(
            Refused(request_id, "busy", "echo")
        )

    def on_opened(self, session: Session) -> None:
        self.opened.append(session)

    def on_message(self, session: Session, message: ClientMessage) -> None:
        self.messages.append(message)
        if isinstance(message, Abort):
            self.on_abort(session, message.request_id)

    def on_closed(self, session: Session) -> None:
        self.closed.append(session)


@asynccontextmanager
async def serving(
    silence_seconds: float = 7.5,
) -> AsyncIterator[tuple[SessionServer, Handler, str]]:
    handler = Handler()
    server = SessionServer(lambda: b"metrics", KEY, handler.refused.append, silence_seconds)
    port = await server.listen("127.0.0.1")
    server.serve(handler)
    yield server, handler, f"ws://127.0.0.1:{port}/session"
    await server.close()


@asynccontextmanager
async def raw_socket(url: str, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A client that need not behave."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url, headers=with_key(KEY), **options) as ws,
    ):
        yield ws


class Listener:
    def __init__(self) -> None:
        self.messages: list[WorkerMessage] = []
        self.num_closed = 0

    def on_closed(self) -> None:
        self.num_closed += 1


@pytest.fixture(autouse=True, params=[asyncio.new_event_loop, uvloop.new_event_loop])
def event_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray runs its actors on uvloop where that is installed, as it is beside Serve."""
    monkeypatch.setattr(asyncio, "new_event_loop", request.param)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a scenario; nothing may be left on the loop by its end."""

    async def checked() -> None:
        problems: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        await asyncio.wait_for(test, 30)
        await until(lambda: not [t for t in asyncio.all_tasks() if t is not asyncio.current_task()])
        assert not problems

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(checked())
    gc.collect()  # what was left open is reported by the test that left it


def test_messages_cross_in_order_and_both_ends_hear_of_the_close() -> None:
    async def scenario() -> None:
        async with serving() as (server, handler, url):
            heard = Listener()
            client = await ClientSession.connect(url, "me", KEY)
            assert client.card == CARD
            client.start(heard.messages.append, heard.on_closed)
            for i in range(50):
                client.send(Abort(str(i)))
            await until(lambda: len(heard.messages) == 50)
            assert heard.messages == [Refused(str(i), "busy", "echo") for i in range(50)]
            await client.close()
            assert heard.num_closed == 1
            await until(lambda: handler.closed == handler.opened)
            assert server.sessions == set()
            client.send(Abort("late"))  # harmless

    run(scenario())


@pytest.mark.parametrize("headers", [{}, with_key("another"), with_key(""), with_key(KEY + "\xe9")])
def test_a_stranger_gets_no_session(
    headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving() as (server, handler, url), aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(url, headers=headers)
            assert refused.value.status == 401
            assert handler.refused == ["key"]
            assert not handler.opened
            assert not server.sessions

    run(scenario())
    assert "127.0.0.1 does not know the key" in caplog.text
    assert KEY not in caplog.text


def test_a_client_with_another_key_is_told_so_and_neither_key_is_named() -> None:
    async def scenario() -> None:
        async with serving() as (_, _handler, url):
            with pytest.raises(LinkBrokenError, match="it has another key") as refused:
                await ClientSession.connect(url, "me", "wrong one")
            assert "wrong one" not in str(refused.value)

    run(scenario())


def test_every_worker_has_a_key_of_its_own() -> None:
    keys = {new_session_key() for _ in range(20)}
    assert len(keys) == 20
    assert min(map(len, keys)) >= 43  # 256 bits


def test_what_was_queued_is_sent_before_a_close() -> None:
    async def scenario() -> None:
        async with serving() as (_, handler, url):
            client = await ClientSession.connect(url, "me", KEY)
            client.send(Abort("last words"))
            await client.close()
            await until(lambda: handler.messages == [Abort("last words")])

    run(scenario())


def test_a_server_that_closes_tells_its_clients() -> None:
    async def scenario() -> None:
        heard = Listener()
        async with serving() as (_, _handler, url):
            client = await ClientSession.connect(url, "me", KEY)
            client.start(heard.messages.append, heard.on_closed)
        await until(lambda: heard.num_closed == 1)
        assert client.is_closed
        with pytest.raises(LinkBrokenError, match="no session with"):
            await ClientSession.connect(url, "me", KEY)

    run(scenario())


def test_a_client_that_drops_dead_is_noticed_at_once() -> None:
    async def scenario() -> None:
        async with serving() as (_, handler, url), raw_socket(url) as ws:
            await ws.send_bytes(encode(Hello(PROTOCOL_VERSION, "me", False)))
            await until(lambda: len(handler.opened) == 1)
            ws._response.connection.transport.abort()  # type: ignore[union-attr]
            assert await until(lambda: len(handler.closed) == 1) < 1.0

    run(scenario())


@pytest.mark.parametrize(
    "hello", [encode(Hello(PROTOCOL_VERSION + 1, "me", False)), encode(Abort("x")), b"\xc1 no"]
)
def test_a_client_of_another_protocol_is_refused_with_a_reason(hello: bytes) -> None:
    async def scenario() -> None:
        async with serving() as (server, handler, url), raw_socket(url) as ws:
            await ws.send_bytes(hello)
            raw = await ws.receive(timeout=5)
            assert raw.type is aiohttp.WSMsgType.CLOSE
            assert f"speaks protocol version {PROTOCOL_VERSION}" in raw.extra
            assert handler.refused == ["protocol"]
            assert not handler.opened
            assert not server.sessions

    run(scenario())


def test_a_client_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_HELLO_SECONDS", 0.05)

    async def scenario() -> None:
        async with serving() as (_, handler, url), raw_socket(url) as ws:
            raw = await ws.receive(timeout=5)
            assert raw.type is aiohttp.WSMsgType.CLOSE
            assert raw.extra.startswith("no hello")
            assert handler.refused == ["silent"]

    run(scenario())


def test_an_unreadable_message_ends_its_session_alone() -> None:
    async def scenario() -> None:
        async with serving() as (_, handler, url):
            other, heard = await ClientSession.connect(url, "other", KEY), Listener()
            other.start(heard.messages.append, heard.on_closed)
            async with raw_socket(url) as ws:
                await ws.send_bytes(encode(Hello(PROTOCOL_VERSION, "me", False)))
                await ws.receive(timeout=5)
                await ws.send_bytes(b"\xc1 no message")
                await until(lambda: [s.client_id for s in handler.closed] == ["me"])
            other.send(Abort("x"))
            await until(lambda: len(heard.messages) == 1)
            await other.close()

    run(scenario())


def test_a_message_that_breaks_its_handler_ends_its_session_and_is_cleaned_up() -> None:
    async def scenario() -> None:
        async with serving() as (server, handler, url):

            def fail(session: Session, request_id: str) -> None:
                raise KeyError(request_id)

            handler.on_abort = fail
            client, heard = await ClientSession.connect(url, "me", KEY), Listener()
            client.start(heard.messages.append, heard.on_closed)
            client.send(Abort("x"))
            await until(lambda: heard.num_closed == 1)
            assert handler.closed == handler.opened
            assert not server.sessions

    run(scenario())


def test_a_client_that_cannot_handle_a_message_is_told_that_the_session_ended() -> None:
    async def scenario() -> None:
        async with serving() as (_, handler, url):
            heard = Listener()

            def fail(message: WorkerMessage) -> None:
                raise KeyError("no")

            client = await ClientSession.connect(url, "me", KEY)
            client.start(fail, heard.on_closed)
            client.send(Abort("x"))
            await until(lambda: heard.num_closed == 1)
            await until(lambda: handler.closed == handler.opened)

    run(scenario())


def test_a_peer_that_reads_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_channel, "MAX_OUTBOX_MESSAGES", 20)
    monkeypatch.setattr(session_channel, "_CLOSE_SECONDS", 0.2)

    async def scenario() -> None:
        async with serving() as (server, handler, url), raw_socket(url) as ws:
            await ws.send_bytes(encode(Hello(PROTOCOL_VERSION, "slow", False)))
            await until(lambda: len(handler.opened) == 1)
            (session,) = handler.opened
            transport = ws._response.connection.transport  # type: ignore[union-attr]
            transport.pause_reading()
            big = Refused("x", "busy", "y" * 1_000_000)
            num_sent = 0
            async with asyncio.timeout(20):
                while not session.is_closed:
                    session.send(big)
                    num_sent += 1
                    await asyncio.sleep(0)
            assert num_sent > 20
            await until(lambda: handler.closed == [session])
            assert not server.sessions
            transport.abort()

    run(scenario())


def test_a_peer_that_hangs_loses_its_session() -> None:
    """It keeps the connection open and reads, but answers no ping."""

    async def scenario() -> None:
        async with serving(0.15) as (_, handler, url), raw_socket(url, autoping=False) as ws:
            await ws.send_bytes(encode(Hello(PROTOCOL_VERSION, "hung", False)))
            await until(lambda: len(handler.closed) == 1, seconds=5)

    run(scenario())


def test_a_worker_that_hangs_loses_its_clients() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0].decode()
        digest = hashlib.sha1(key.encode() + aiohttp.http_websocket.WS_KEY).digest()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + b"Sec-WebSocket-Accept: "
            + base64.b64encode(digest)
            + b"\r\n\r\n"
        )
        welcome = encode(Welcome(CARD))
        writer.write(bytes([0x82, 126]) + len(welcome).to_bytes(2, "big") + welcome)
        await writer.drain()
        await reader.read(-1)  # and says nothing more
        writer.close()

    async def scenario() -> None:
        worker = await asyncio.start_server(hang, "127.0.0.1", 0)
        port = worker.sockets[0].getsockname()[1]
        url, heard = f"ws://127.0.0.1:{port}/", Listener()
        client = await ClientSession.connect(url, "me", KEY, silence_seconds=0.15)
        client.start(heard.messages.append, heard.on_closed)
        await until(lambda: heard.num_closed == 1, seconds=5)
        worker.close()

    run(scenario())


def test_connecting_is_bounded_and_leaves_nothing_open() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
            url = f"ws://127.0.0.1:{silent.getsockname()[1]}/session"
            with pytest.raises(LinkBrokenError, match="timed out"):
                await ClientSession.connect(url, "me", KEY, timeout=0.05)
            connecting = asyncio.create_task(ClientSession.connect(url, "me", KEY))
            await asyncio.sleep(0.05)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting

    run(scenario())


def test_a_worker_without_a_handler_is_still_starting() -> None:
    async def scenario() -> None:
        server = SessionServer(lambda: b"metrics", KEY, print)
        port = await server.listen("127.0.0.1")
        with pytest.raises(LinkBrokenError, match="503"):
            await ClientSession.connect(f"ws://127.0.0.1:{port}/session", "me", KEY)
        await server.close()

    run(scenario())


def test_requests_share_one_session_with_a_peer_and_a_failure_is_not_remembered() -> None:
    async def scenario() -> None:
        lost: list[ClientSession] = []
        peers = Peers("me")
        async with serving() as (_, handler, url):
            stranger = PrefillPeer(url, "other", session_key=KEY)
            nowhere = PrefillPeer("ws://127.0.0.1:9/session", "inc")
            for peer in (stranger, nowhere):
                failed = await asyncio.gather(
                    *(peers.get(peer, print, lost.append) for _ in range(3)),
                    return_exceptions=True,
                )
                assert {type(error) for error in failed} == {LinkBrokenError}
            peer = PrefillPeer(url, "inc", session_key=KEY)
            asking = [asyncio.create_task(peers.get(peer, print, lost.append)) for _ in range(3)]
            await asyncio.sleep(0)
            asking[0].cancel()  # one request's abort takes nothing from the others
            sessions = [await task for task in asking[1:]]
            assert sessions[0] is sessions[1]
            assert len([s for s in handler.opened if s.client_id == "me"]) == 2  # and the stranger
        await until(lambda: lost == [sessions[0]])
        await peers.close()

    run(scenario())


def test_sessions_with_peers_are_closed_all_at_once() -> None:
    """Else each peer that hangs would hold up a worker that stops, for seconds."""

    async def scenario() -> None:
        peers, meeting = Peers("me"), asyncio.Barrier(2)

        async def open_session() -> Any:
            return SimpleNamespace(close=meeting.wait)  # returns once both are being closed

        for incarnation in "ab":
            peers._sessions[incarnation] = asyncio.create_task(open_session())
        await asyncio.gather(*peers._sessions.values())
        await asyncio.wait_for(peers.close(), 5)
        assert peers._sessions == {}

    run(scenario())


def test_welcome_is_the_first_message() -> None:
    async def scenario() -> None:
        async with serving() as (_, _handler, url), raw_socket(url) as ws:
            await ws.send_bytes(encode(Hello(PROTOCOL_VERSION, "me", True)))
            assert decode_worker_message((await ws.receive(timeout=5)).data) == Welcome(CARD)

    run(scenario())
