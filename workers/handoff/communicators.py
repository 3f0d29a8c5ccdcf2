"""Makes and ends communicators on threads of their own: NCCL bounds neither.

    make ──in time──▶ the link has it ──the link closes──▶ end ──in time──▶ gone
      └──too late───▶ given up ──returns after all──▶ closed └──too late──▶ given up

NCCL's initialisation waits for its peer for ever, and until it has returned there is nothing that
could be aborted. ``abort`` frees memory, for which it waits until the device is done, and NCCL may
wait for the peer there too; the destructor of torch's group then joins its watchdog. So neither is
for a thread that holds staging or transfers, or for an event loop. While a few calls of either kind
hang, nothing further is made.
"""

import contextlib
import logging
import threading
from collections.abc import Callable

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff import bounded_calls
from antiphon.workers.handoff.bounded_calls import BoundedCalls
from antiphon.workers.handoff.transport import Link

logger = logging.getLogger(__name__)

END_SECONDS = 10.0  # an abort waits for the step that the engine is in, seconds at the most


class Communicators:
    """Makes links with a communicator, and ends communicators. Thread-safe."""

    def __init__(self) -> None:
        self._set_ups: BoundedCalls[Link] = BoundedCalls("NCCL set-up")
        self._aborts: BoundedCalls[None] = BoundedCalls("NCCL abort")

    @property
    def num_given_up(self) -> int:
        """Calls that were given up and have not returned."""
        return self._set_ups.num_given_up + self._aborts.num_given_up

    def make(self, make: Callable[[], Link], timeout_seconds: float) -> Link:
        """Return what ``make`` makes; it is closed if it comes too late.

        Raises:
            LinkBrokenError: It failed, did not return in time, or too many other calls never have.
        """
        if self._aborts.num_given_up >= bounded_calls.MAX_GIVEN_UP:
            raise LinkBrokenError(
                f"NCCL set-up was not begun: {self._aborts.num_given_up} aborts hang"
            )
        try:
            return self._set_ups.run(make, timeout_seconds)
        except RuntimeError as error:
            raise LinkBrokenError(f"NCCL set-up failed: {error}") from error

    def end(self, end: Callable[[], None]) -> None:
        """Call what ends a communicator, on another thread; returns at once."""
        # No daemon: an interpreter that exits waits for it, rather than to tear down CUDA below it.
        thread = threading.Thread(target=self._end, args=(end,), name="handoff-nccl-end")
        try:
            thread.start()
        except RuntimeError as error:  # the pod's bound of threads is reached
            logger.warning("a communicator is ended without a thread of its own: %s", error)
            end()

    def _end(self, end: Callable[[], None]) -> None:
        with contextlib.suppress(LinkBrokenError):  # it took too long, which is logged and counted
            self._aborts.run(end, END_SECONDS, must_happen=True)
