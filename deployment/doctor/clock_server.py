"""A port that tells its clock, and the look at one from elsewhere.

Each byte that comes is answered with the time. So one connection shows that the port is reached,
how long the way is, and how far the clocks are apart: the answer is taken to be made half a round
trip after the question, which is wrong by at most that half.
"""

import contextlib
import socket
import socketserver
import struct
import threading
import time
from dataclasses import replace
from typing import BinaryIO

from antiphon.deployment.doctor.facts import PathFacts

_TIME = struct.Struct("!d")
_NUM_QUESTIONS = 8
_IDLE_SECONDS = 10.0
_CLOSE_SECONDS = 0.05


class _Clock(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.settimeout(_IDLE_SECONDS)
            while self.request.recv(1):
                self.request.sendall(_TIME.pack(time.time()))


class ClockServer(socketserver.ThreadingTCPServer):
    """Answers until it is closed; connections end with their clients.

    Args:
        host: To listen on, at a port of the system's choice.
    """

    daemon_threads = True

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), _Clock)
        self.address = f"{host}:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve_forever, args=(_CLOSE_SECONDS,), daemon=True).start()

    def close(self) -> None:
        """Close the port."""
        self.shutdown()
        self.server_close()


def look(source: str, target: str, address: str, timeout_seconds: float) -> PathFacts:
    """Connect to a ``ClockServer``; each wait in it is bounded by ``timeout_seconds``."""
    facts = PathFacts(source, target)
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), timeout_seconds) as connection,
            connection.makefile("rb") as answers,
        ):
            round_trip, offset = min(_ask(connection, answers) for _ in range(_NUM_QUESTIONS))
    except OSError as error:
        return replace(facts, error=f"{address}: {error}")
    return replace(facts, round_trip_seconds=round_trip, clock_offset_seconds=offset)


def _ask(connection: socket.socket, answers: BinaryIO) -> tuple[float, float]:
    """Seconds of a round trip, and by how many the other clock is ahead."""
    asked_at, started_at = time.time(), time.perf_counter()
    connection.sendall(b"?")
    answer = answers.read(_TIME.size)
    round_trip = time.perf_counter() - started_at
    if len(answer) < _TIME.size:
        raise ConnectionResetError("closed without an answer")
    return round_trip, _TIME.unpack(answer)[0] - asked_at - round_trip / 2
