"""Log lines that storms and strangers can repeat without bound: one a minute for each subject."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

_QUIET_SECONDS = 60.0  # between two lines of one subject
_MAX_SUBJECTS = 1024  # peers come and go


class SeldomLog:
    """Writes a line unless one of its subject was written lately; from any thread.

    Args:
        logger: Where lines go.
        clock: Seconds; decides when a subject may be logged again.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._subjects: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()  # oldest first

    def log(self, level: int, subject: Hashable, message: str, *arguments: object) -> None:
        """Write a line, with the number of those like it that were left out before."""
        num_left_out = self._admit(subject)
        if num_left_out is not None:
            self._logger.log(
                level,
                f"{message}; %d more like it since the last such line",
                *arguments,
                num_left_out,
            )

    def _admit(self, subject: Hashable) -> int | None:
        """How many were left out; None if this one is, too."""
        now = self._clock()
        with self._lock:
            logged_at, num_left_out = self._subjects.get(subject, (now - _QUIET_SECONDS, 0))
            if now - logged_at < _QUIET_SECONDS:
                self._subjects[subject] = logged_at, num_left_out + 1
                return None
            self._subjects[subject] = now, 0
            self._subjects.move_to_end(subject)
            while len(self._subjects) > _MAX_SUBJECTS:
                self._subjects.popitem(last=False)
            return num_left_out
