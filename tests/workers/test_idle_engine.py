"""What an engine says while it has nothing to do."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon.messages import Load
from antiphon.workers import engine as engine_module
from antiphon.workers.batch import Batch
from antiphon.workers.engine import Engine
from antiphon.workers.request import Request
from antiphon.workers.scheduler import SchedulerConfig

WAIT_SECONDS = 20.0


class Loads:
    """A listener that keeps the loads."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.seen: list[Load] = []

    def on_changed(self, stored: Any, removed: Any, load: Load) -> None:
        with self.changed:
            self.seen.append(load)
            self.changed.notify_all()

    def __getattr__(self, name: str) -> Any:
        return lambda *report: None

    def wait_until(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.seen), WAIT_SECONDS), self.seen[-1]


def test_an_idle_engine_reports_until_its_share_of_prompts_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock of the test's own, which stands still but for the prompt's one step of 10 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(engine_module, "_IDLE_REPORT_SECONDS", 0.001)

    def run(batch: Batch, is_abandoned: Any) -> list[int]:
        clock.now += 10.0
        return []

    runner: Any = SimpleNamespace(
        cache=SimpleNamespace(num_blocks=8, block_size=4),
        num_graph_steps=0,
        run=run,
        settle=lambda: None,
    )
    loads = Loads()
    engine = Engine(runner, SchedulerConfig(max_batch_tokens=16), loads)  # type: ignore[arg-type]
    waits: list[float | None] = []
    commands = engine._commands

    def get(block: bool = True, timeout: float | None = None) -> Any:
        waits.append(timeout)
        return commands.get(block, timeout)

    engine._commands = SimpleNamespace(  # type: ignore[assignment]
        get=get, get_nowait=commands.get_nowait, put=commands.put
    )
    engine.start()
    try:
        engine.add(Request("prompt", [1] * 9, None))
        loads.wait_until(lambda seen: seen[-1].prompt_share > 0.5 and len(seen) > 5)
        clock.now += 60.0
        loads.wait_until(lambda seen: seen[-1].prompt_share < 0.02)
    finally:
        engine.stop()
    assert waits[0] is waits[-1] is None, "it waits for work alone"
