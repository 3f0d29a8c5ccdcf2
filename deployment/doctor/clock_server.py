"""A port that tells its clock, and the look at one from elsewhere.

Each byte that comes is answered with the time. So one connection shows that the port is reached,
how long the way is, and how far the clocks are apart: the answer is taken to be made half a round
trip after the question, which is wrong by at most that half.
"""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import replace

from antiphon.deployment.doctor.facts import PathFacts

_TIME = struct.Struct("!d")
_NUM_QUESTIONS = 8


class ClockServer:
    """Answers until it is closed.

    Args:
        host: To listen on, at a port of the system's choice.
    """

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        port = self._listener.getsockname()[1]
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, name="clock-server", daemon=True).start()

    def close(self) -> None:
        """Close the port; connections end with their clients."""
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def look(source: str, target: str, address: str, timeout_seconds: float) -> PathFacts:
    """Connect to a ``ClockServer``; each wait in it is bounded by ``timeout_seconds``."""
    facts = PathFacts(source, target)
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout_seconds) as connection:
            trips = [_ask(connection) for _ in range(_NUM_QUESTIONS)]
    except OSError as error:
        return replace(facts, error=f"{address}: {error}")
    round_trip, offset = min(trips)
    return replace(facts, round_trip_seconds=round_trip, clock_offset_seconds=offset)


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(10.0)
        while connection.recv(1):
            connection.sendall(_TIME.pack(time.time()))


def _ask(connection: socket.socket) -> tuple[float, float]:
    """Seconds of a round trip, and by how many the other clock is ahead."""
    asked_at = time.time()
    started_at = time.perf_counter()
    connection.sendall(b"?")
    answer = b""
    while len(answer) < _TIME.size:
        part = connection.recv(_TIME.size - len(answer))
        if not part:
            raise ConnectionResetError("closed without an answer")
        answer += part
    round_trip = time.perf_counter() - started_at
    return round_trip, _TIME.unpack(answer)[0] - asked_at - round_trip / 2
