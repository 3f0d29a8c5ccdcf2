"""Strangers at a worker's port: each is counted, and none can fill the log."""

import asyncio

import pytest
from pools import until

from antiphon.workers.session import SessionServer
from antiphon.workers.session_refusals import SessionRefusals


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_is_counted_and_one_a_minute_is_logged_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    counted: list[str] = []
    refusals = SessionRefusals(counted.append, clock)
    for clock.now in (0.0, 1.0, 59.9):
        refusals.note("key", "10.0.0.9 does not know the key")
        refusals.note("silent", "no hello")
    clock.now = 60.0
    refusals.note("key", "10.0.0.9 does not know the key")
    assert (counted.count("key"), counted.count("silent")) == (4, 3)
    refused = "a session was refused"
    assert [record.getMessage() for record in caplog.records] == [
        f"{refused}: 10.0.0.9 does not know the key; 0 more like it since the last such line",
        f"{refused}: no hello; 0 more like it since the last such line",
        f"{refused}: 10.0.0.9 does not know the key; 2 more like it since the last such line",
    ]


def test_who_scans_the_port_writes_one_line(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[str] = []

    async def knock(port: int, request: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()

    async def scenario() -> None:
        server = SessionServer(lambda: b"metrics", "the-key", counted.append)
        port = await server.listen("127.0.0.1")
        for _ in range(10):
            await knock(port, b"GET / HTTP/1.1\r\nno colon here\r\n\r\n")
            await knock(port, b"GET /session HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await until(lambda: sorted(counted) == 10 * ["http"] + 10 * ["key"])
        await server.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert len(caplog.records) == 2
    assert "Traceback" not in caplog.text
