"""Bounds the making of a communicator, which has no bound of its own and cannot be broken off.

    make ──in time──▶ the link has it
      └──too late───▶ given up: the link breaks now ──returns after all──▶ aborted

NCCL's initialisation waits for its peer for ever, and until it has returned there is nothing that
could be aborted. So it runs on a thread of its own, which holds neither staging nor transfers. One
that was given up waits on until NCCL lets go of it; while a few do, no further ones are begun.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from antiphon.errors import LinkBrokenError

logger = logging.getLogger(__name__)

MAX_GIVEN_UP = 8  # threads that may wait for nothing; each has a stack and NCCL's sockets


class SetUps:
    """Makes communicators, each within a time-out. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_given_up = 0

    @property
    def num_given_up(self) -> int:
        """Set-ups that were given up and have not returned."""
        return self._num_given_up

    def run(self, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Return what ``make`` makes; it has an ``abort``, and is aborted if it comes too late.

        Raises:
            LinkBrokenError: It failed, did not return in time, or too many others never have.
        """
        if self._num_given_up >= MAX_GIVEN_UP:
            raise LinkBrokenError(
                f"NCCL set-up was not begun: {self._num_given_up} that were given up hang still"
            )
        made: Future[Any] = Future()
        name = "handoff-nccl-set-up"
        threading.Thread(target=_make, args=(make, made), name=name, daemon=True).start()
        try:
            return made.result(timeout_seconds)
        except TimeoutError:
            self._give_up(made)
            raise LinkBrokenError(f"NCCL set-up did not end in {timeout_seconds:.1f} s") from None
        except RuntimeError as error:
            raise LinkBrokenError(f"NCCL set-up failed: {error}") from error

    def _give_up(self, made: Future[Any]) -> None:
        with self._lock:
            self._num_given_up += 1
        logger.warning("NCCL set-up is given up; %d such hang now", self._num_given_up)
        made.add_done_callback(self._came_late)

    def _came_late(self, made: Future[Any]) -> None:
        with self._lock:
            self._num_given_up -= 1
        if made.exception() is None:
            with contextlib.suppress(RuntimeError):  # the peer may have given up, too
                made.result().abort()


def _make(make: Callable[[], Any], made: Future[Any]) -> None:
    try:
        made.set_result(make())
    except Exception as error:
        made.set_exception(error)
