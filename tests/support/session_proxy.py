"""A TCP proxy in front of a worker's sessions, which can be slow, stop carrying, and cut."""

import asyncio
import contextlib
from urllib.parse import urlsplit


class SessionProxy:
    """Forwards connections to one worker; lives on the event loop."""

    def __init__(self, url: str) -> None:
        self.delay_seconds = 0.0  # what arrives meanwhile goes on together, so up to twice as long
        self._target = urlsplit(url)
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def listen(self) -> str:
        """Take a port; returns the URL that stands for the worker's."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return self._target._replace(netloc=f"127.0.0.1:{port}").geturl()

    def hold(self) -> None:
        """Carry nothing, in either direction, until ``release``."""
        self._flows.clear()

    def release(self) -> None:
        """Carry what has piled up, and go on."""
        self._flows.set()

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Stop listening and cut."""
        self._server.close()
        self.release()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, far[1]), (far[0], writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._writers.add(sink)
        try:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    await asyncio.sleep(self.delay_seconds)
                    await self._flows.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            self._writers.discard(sink)
            sink.transport.abort()
