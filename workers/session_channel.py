"""The sending half of a session, the same at both ends.

Sending never blocks: messages go to an outbox that one task drains, so a step's output is one write
and what piled up behind a slow socket leaves together. A peer that reads nothing for too long loses
its session.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from typing import Any

import aiohttp
from aiohttp import web

from antiphon.messages import encode

logger = logging.getLogger(__name__)

MAX_OUTBOX_MESSAGES = 10_000
_CLOSE_SECONDS = 2.0

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class Channel:
    """A socket with an outbox."""

    def __init__(self, ws: Socket) -> None:
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
                _shut_down(raw.fileno())

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


def _shut_down(descriptor: int) -> None:
    """End a connection under its event loop, which may be uvloop: its sockets cannot do this."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        copy.shutdown(socket.SHUT_RDWR)
