"""Threads that take turns, on a clock that jumps: every interleaving can be chosen and repeated.

Code under test runs on real threads, of which exactly one has the turn. It passes the turn on where
another thread could get in between: on taking a lock, on waiting, on starting or joining a thread,
and where a test says so (``Turns.pause``). Time stands still while anybody can run; when nobody
can, it jumps to the first deadline. So a time-out costs nothing, two runs with the same choices are
the same, and a deadlock is an error and not a hang.
"""

import threading
from collections.abc import Callable

MAX_TURNS = 200_000  # of a run; the longest of the tests takes a few thousand
Choose = Callable[[int], int]  # of n threads that can run, the one that had the turn first


class StuckError(AssertionError):
    """Nobody can ever run again, or the run does not end."""


class _Unwind(BaseException):
    """Takes a thread of a run that is stuck to its end."""


class Task:
    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = threading.Lock()
        self.gate.acquire()
        self.ready: Callable[[], bool] = lambda: True
        self.deadline: float | None = None
        self.comes_first = False
        self.is_done = False

    def can_run(self, now: float) -> bool:
        return self.ready() or (self.deadline is not None and self.deadline <= now)


class Turns:
    """Who runs next, and what time it is."""

    def __init__(self, choose: Choose) -> None:
        self.now = 0.0
        self.errors: list[BaseException] = []
        self._choose = choose
        self._main = self._current = Task("test")
        self._tasks = [self._main]
        self._num_turns = 0
        self._stuck: str | None = None

    @property
    def running(self) -> list[str]:
        """Names of the threads that were started and have not ended."""
        return [task.name for task in self._tasks if task is not self._main]

    def pause(self) -> None:
        """Let others get in between."""
        self.wait(lambda: True)

    def sleep(self, seconds: float) -> None:
        """Let time pass, and whoever can run meanwhile."""
        self.wait(lambda: False, seconds)

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Pass the turn until ``ready()`` or the time-out; returns what ``ready()`` says then."""
        task = self._current
        task.ready = ready
        task.deadline = None if timeout is None else self.now + max(timeout, 0.0)
        self._pass_on(task)
        if self._stuck is not None:
            raise StuckError(self._stuck) if task is self._main else _Unwind
        return ready()

    def catch(self, moment: Callable[[], bool], timeout: float) -> bool:
        """Wait for a moment that may be short, and get the turn in it whatever the choices say."""
        task = self._current
        task.comes_first = True
        caught = self.wait(moment, timeout)
        task.comes_first = False
        return caught

    def run(self, task: Task, target: Callable[[], None]) -> None:
        """What a thread does: wait for its first turn, work, leave."""
        task.gate.acquire()
        try:
            if self._stuck is None:
                target()
        except _Unwind:
            pass  # the test's own thread raises StuckError
        except BaseException as error:
            self.errors.append(error)
        task.is_done = True
        self._tasks.remove(task)
        self._pass_on(task)

    def add(self, name: str) -> Task:
        """A task for a thread that has not started yet."""
        task = Task(name)
        self._tasks.append(task)
        return task

    def _pass_on(self, task: Task) -> None:
        following = self._next(task)
        if following is not task:
            self._current = following
            following.gate.release()
            if not task.is_done:
                task.gate.acquire()

    def _next(self, last: Task) -> Task:
        self._num_turns += 1
        if self._stuck is not None or self._num_turns > MAX_TURNS:
            return self._give_up(f"no end after {MAX_TURNS} turns")
        while not (able := [task for task in self._tasks if task.can_run(self.now)]):
            deadlines = [task.deadline for task in self._tasks if task.deadline is not None]
            if not deadlines:
                return self._give_up(f"deadlock of {[task.name for task in self._tasks]}")
            self.now = min(deadlines)
        for task in able:
            if task.comes_first and task.ready():
                return task
        if last in able:
            able.remove(last)
            able.insert(0, last)
        return able[self._choose(len(able)) if len(able) > 1 else 0]

    def _give_up(self, why: str) -> Task:
        self._stuck = self._stuck or why
        return next((task for task in self._tasks if task is not self._main), self._main)
