"""Calls that no time-out of their own ends and nothing can break off, each within a bound.

    call ──in time──▶ its result
      └──too late───▶ given up: an error now ──returns after all──▶ its result is closed

Each runs on a thread of its own, which holds neither staging nor transfers. One that was given up
waits on until it is let go; while a few do, no further ones are begun but those that must happen.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from antiphon.errors import LinkBrokenError

logger = logging.getLogger(__name__)

MAX_GIVEN_UP = 8  # threads that may wait for nothing; each has a stack and a socket


class _Closes(Protocol):
    def close(self) -> None: ...


_Made = TypeVar("_Made", bound=_Closes | None)


class BoundedCalls(Generic[_Made]):
    """Calls of one kind. Thread-safe.

    Args:
        what: Is done; for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._num_given_up = 0

    @property
    def num_given_up(self) -> int:
        """Calls that were given up and have not returned."""
        return self._num_given_up

    def run(
        self, make: Callable[[], _Made], timeout_seconds: float, *, must_happen: bool = False
    ) -> _Made:
        """Return what ``make`` makes, or close it if it comes too late.

        Args:
            make: Makes it, or does what leaves nothing to close and returns None.
            timeout_seconds: For that.
            must_happen: Also while too many hang, and here if there is no thread for it.

        Raises:
            LinkBrokenError: It did not return in time, too many others never have, or there is no
                thread for it. Else what ``make`` raises.
        """
        if self._num_given_up >= MAX_GIVEN_UP and not must_happen:
            raise LinkBrokenError(
                f"{self._what} was not begun: {self._num_given_up} that were given up hang still"
            )
        made: Future[_Made] = Future()
        thread = threading.Thread(
            target=_call, args=(make, made), name="handoff-bounded", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the pod's bound of threads is reached
            if must_happen:
                return make()
            raise LinkBrokenError(f"{self._what} was not begun: {error}") from error
        try:
            return made.result(timeout_seconds)
        except TimeoutError:
            self._give_up(made)
            raise LinkBrokenError(f"{self._what} did not end in {timeout_seconds:.1f} s") from None

    def _give_up(self, made: Future[_Made]) -> None:
        with self._lock:
            self._num_given_up += 1
        logger.warning("%s is given up; %d such calls hang now", self._what, self._num_given_up)
        made.add_done_callback(self._came_late)

    def _came_late(self, made: Future[_Made]) -> None:
        with self._lock:
            self._num_given_up -= 1
        if made.exception() is None and (late := made.result()) is not None:
            late.close()


def _call(make: Callable[[], _Made], made: Future[_Made]) -> None:
    try:
        made.set_result(make())
    except Exception as error:
        made.set_exception(error)
