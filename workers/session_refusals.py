"""Clients that a worker's port sent away: counted each, logged now and then.

    key        does not know the worker's key
    protocol   speaks another version, or something else after the handshake
    silent     says nothing after it
    http       speaks no HTTP at all, as scanners of ports do

A port is open to whoever reaches it, and a log that strangers can fill hides what happened before.
"""

import logging
import time
from collections.abc import Callable

from aiohttp.http import HttpProcessingError

from antiphon.workers.seldom_log import SeldomLog

logger = logging.getLogger(__name__)


class SessionRefusals:
    """Takes note of clients that get no session.

    Args:
        on_refused: Told the reason of each, for a counter.
        clock: Seconds; decides when a reason may be logged again.
    """

    def __init__(
        self, on_refused: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_refused = on_refused
        self._log = SeldomLog(logger, clock)

    def note(self, reason: str, words: str) -> None:
        """Count one, and log it unless one of its reason was logged less than a minute ago.

        Args:
            reason: One of those above.
            words: For the log; nothing that a client may choose the length of.
        """
        self._on_refused(reason)
        self._log.log(logging.WARNING, reason, "a session was refused: %s", words)

    def http_logger(self) -> logging.Logger:
        """A logger for aiohttp's server, which would write a traceback for each bad request."""
        http = logging.Logger(f"{__name__}.http")
        http.parent = logger
        http.addFilter(self._is_our_fault)
        return http

    def _is_our_fault(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            self.note("http", f"a client sent what is no HTTP ({type(error).__name__})")
            return False
        return True
