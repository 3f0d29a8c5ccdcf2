"""What a worker tells its subscribers: cached blocks, load and rates.

The engine thread reports after every step; reports are folded together and published from the event
loop at most once per interval, as one message for all subscribers. Sequence numbers have no gaps: a
subscriber that sees one has missed something and must start again from a snapshot.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from antiphon.block_hash import BlockHash
from antiphon.messages import Load, Telemetry
from antiphon.workers.session import Session

PUBLISH_INTERVAL_SECONDS = 0.05
IDLE_LOAD = Load(0, 0, 0, 0, 0.0, 0.0)


class TelemetryPublisher:
    """Folds engine reports into a stream of snapshots and deltas.

    Args:
        loop: Where publishing happens.
        sessions: The open sessions; those that want telemetry get it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sessions: Callable[[], Iterable[Session]]
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._lock = threading.Lock()
        self._pending: dict[BlockHash, bool] = {}  # hash -> stored, else removed
        self._cached: dict[BlockHash, None] = {}  # as of the last publication
        self._load = IDLE_LOAD
        self._published_load = IDLE_LOAD
        self._sequence = 0
        self._is_scheduled = False
        self._is_draining = False

    def report(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        """Take in a change; from any thread."""
        with self._lock:
            self._pending.update(dict.fromkeys(stored, True))
            self._pending.update(dict.fromkeys(removed, False))
            self._take_load(load)

    def drain(self) -> None:
        """Say, now and in every load to come, that the worker takes nothing new."""
        with self._lock:
            self._is_draining = True
            self._take_load(self._load)

    def snapshot(self) -> Telemetry:
        """All that is known, for a new subscriber; on the event loop."""
        return Telemetry(self._sequence, True, list(self._cached), [], self._published_load)

    def publish(self) -> None:
        """Send what piled up to every subscriber; on the event loop."""
        with self._lock:
            pending, self._pending = self._pending, {}
            self._published_load = self._load
            self._is_scheduled = False
        stored = [h for h, is_stored in pending.items() if is_stored]
        removed = [h for h, is_stored in pending.items() if not is_stored]
        self._cached.update(dict.fromkeys(stored))
        for block_hash in removed:
            self._cached.pop(block_hash, None)
        self._sequence += 1
        message = Telemetry(self._sequence, False, stored, removed, self._published_load)
        for session in self._sessions():
            if session.wants_telemetry:
                session.send(message)

    def _take_load(self, load: Load) -> None:
        self._load = replace(load, is_draining=True) if self._is_draining else load
        if not self._is_scheduled and (self._pending or self._load != self._published_load):
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        self._loop.call_later(PUBLISH_INTERVAL_SECONDS, self.publish)
