"""``threading`` and ``time`` for code under test whose threads take turns (see ``turns``)."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from turns import Choose, Task, Turns


class _Lock:
    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._is_held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking:
            limit = None if timeout < 0 else timeout
            self._turns.wait(lambda: not self._is_held, limit)
        if self._is_held:
            return False
        self._is_held = True
        return True

    def release(self) -> None:
        assert self._is_held, "a lock was released that nobody held"
        self._is_held = False

    def locked(self) -> bool:
        return self._is_held

    def __enter__(self) -> "_Lock":
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Condition:
    def __init__(self, turns: Turns, lock: _Lock | None = None) -> None:
        self._turns = turns
        self._lock = lock or _Lock(turns)
        self._waiting: list[list[bool]] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> "_Condition":
        self._lock.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        assert self._lock.locked(), "waiting needs the lock"
        told = [False]
        self._waiting.append(told)
        self._lock.release()
        self._turns.wait(lambda: told[0], timeout)
        if told in self._waiting:
            self._waiting.remove(told)
        self._lock.acquire()
        return told[0]

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._turns.now + timeout
        while not (result := predicate()):
            left = None if deadline is None else deadline - self._turns.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, n: int = 1) -> None:
        for told in self._waiting[:n]:
            told[0] = True
        del self._waiting[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class _Event:
    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        return self._turns.wait(self.is_set, timeout)


class _Semaphore:
    def __init__(self, turns: Turns, value: int = 1) -> None:
        self._turns = turns
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if blocking:
            self._turns.wait(lambda: self._value > 0, timeout)
        if self._value == 0:
            return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n


class _Thread:
    def __init__(
        self,
        turns: Turns,
        target: Callable[..., None],
        name: str = "thread",
        args: tuple[Any, ...] = (),
        daemon: bool | None = None,
    ) -> None:
        self.name = name
        self._turns = turns
        self._target = lambda: target(*args)
        self._task: Task | None = None

    def start(self) -> None:
        self._task = task = self._turns.add(self.name)
        real = threading.Thread(target=self._turns.run, args=(task, self._target), daemon=True)
        real.start()
        self._turns.pause()

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_done

    def join(self, timeout: float | None = None) -> None:
        self._turns.wait(lambda: not self.is_alive(), timeout)


def fake_threading(turns: Turns) -> SimpleNamespace:
    """What the code under test sees as ``threading``."""
    return SimpleNamespace(
        Lock=lambda: _Lock(turns),
        Condition=lambda lock=None: _Condition(turns, lock),
        Event=lambda: _Event(turns),
        Semaphore=lambda value=1: _Semaphore(turns, value),
        Thread=lambda **options: _Thread(turns, **options),
    )


def fake_time(turns: Turns) -> SimpleNamespace:
    """What the code under test sees as ``time``."""

    def clock() -> float:
        return turns.now

    return SimpleNamespace(monotonic=clock, perf_counter=clock, time=clock, sleep=turns.sleep)


@contextlib.contextmanager
def stepped(choose: Choose, *names: str) -> Iterator[Turns]:
    """Put modules, and all those of packages, on stepped threads and their clock."""
    turns = Turns(choose)
    fakes = {"threading": fake_threading(turns), "time": fake_time(turns)}
    replaced: list[tuple[Any, str, Any]] = []
    for found, module in list(sys.modules.items()):
        if any(found == name or found.startswith(f"{name}.") for name in names):
            for attribute, fake in fakes.items():
                if attribute in vars(module):
                    replaced.append((module, attribute, vars(module)[attribute]))
                    setattr(module, attribute, fake)
    try:
        yield turns
    finally:
        for module, attribute, original in replaced:
            setattr(module, attribute, original)
