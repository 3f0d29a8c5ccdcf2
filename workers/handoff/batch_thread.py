"""Starts gloo's thread so that it does not take the core from the thread that it works for.

gloo has a thread of its own for each link. It shares a lock with the link's thread, which whoever
copies to or from the socket holds, for a whole segment at a time. gloo's thread does not wait for
the lock. While there is something to do and the lock is taken, it polls: ``Pair::handleEvents``
tries the lock and returns, and ``epoll_wait`` returns at once. And Linux lets a thread that wakes
up take the core of one that has run for longer. So on one core the thread that polled kept the one
that held the lock from letting go of it, for a time slice of some milliseconds, several times in
each hand-off.

A thread under SCHED_BATCH has the same share of the core, but waits for its turn when it wakes up
(sched(7)). Between two processes on a core each, bare messages of 720 KiB went from 0.7 to 4.2 GB/s
and of 4 MiB from 2.1 to 4.0.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def batch_threads() -> Iterator[None]:
    """Threads that this one starts inside are scheduled as batch threads; this one is not.

    Where that is not to be had, they are as they would be, and links are slower on busy cores: on
    other systems than Linux, under a policy that an administrator chose, or where it is forbidden,
    which is logged.
    """
    with contextlib.ExitStack() as after:
        try:
            if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                after.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        except OSError as error:
            _LOGGER.warning("gloo's threads keep the default policy, which is slower: %s", error)
        yield
