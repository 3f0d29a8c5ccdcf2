"""The thread that ends transfers which run out of time: nothing else finds a peer that hangs."""

import threading
import time
from collections.abc import Callable, Mapping

from antiphon.workers.handoff.incoming import Incoming

_IDLE_SECONDS = 60.0  # an idle watchdog looks around this often, though it is always notified


class Watchdog:
    """Waits for the oldest transfer.

    Args:
        changed: Notified when a transfer is added; its lock guards the transfers.
        transfers: Oldest first, so the first to time out first; the owner changes them.
        timeout_seconds: From ``Incoming.began`` on.
        on_overdue: Has to take the transfer out; called without the lock.
    """

    def __init__(
        self,
        changed: threading.Condition,
        transfers: Mapping[str, Incoming],
        timeout_seconds: float,
        on_overdue: Callable[[Incoming], None],
    ) -> None:
        self._changed = changed
        self._transfers = transfers
        self._timeout_seconds = timeout_seconds
        self._on_overdue = on_overdue
        self._is_stopping = False
        self._thread = threading.Thread(target=self._watch, name="handoff-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end; the caller holds the lock."""
        self._is_stopping = True
        self._changed.notify_all()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread; the lock is free."""
        self._thread.join(timeout_seconds)

    def _watch(self) -> None:
        while (transfer := self._next_overdue()) is not None:
            self._on_overdue(transfer)

    def _next_overdue(self) -> Incoming | None:
        """Wait for a transfer to run out of time; None when stopping."""
        with self._changed:
            while not self._is_stopping:
                oldest = next(iter(self._transfers.values()), None)
                wait_seconds = _IDLE_SECONDS
                if oldest is not None:
                    wait_seconds = oldest.began + self._timeout_seconds - time.monotonic()
                    if wait_seconds <= 0:
                        return oldest
                self._changed.wait(min(wait_seconds, _IDLE_SECONDS))
        return None
