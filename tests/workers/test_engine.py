"""The engine thread: honest about failures, and never silent."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon.block_hash import BlockHash
from antiphon.errors import WorkerBusyError
from antiphon.messages import Load, RequestOutput, SamplingParams
from antiphon.workers import engine as engine_module
from antiphon.workers.batch import Batch
from antiphon.workers.engine import Engine
from antiphon.workers.request import PrefillPath, Request, RequestStatus
from antiphon.workers.scheduler import Scheduler, SchedulerConfig

WAIT_SECONDS = 20.0
TOKEN = 7


class ScriptedRunner:
    """Samples the same token for everybody; may fail, or wait at a gate, before it does."""

    def __init__(self, num_blocks: int = 32, block_size: int = 4) -> None:
        self.cache = SimpleNamespace(num_blocks=num_blocks, block_size=block_size)
        self.num_graph_steps = 0
        self.failures: list[Exception] = []
        self.gate = threading.Semaphore(1000)
        self.on_run: Callable[[], None] = lambda: None
        self.batches: list[list[tuple[str, int]]] = []

    def run(self, batch: Batch, is_abandoned: Callable[[], bool]) -> list[int]:
        self.batches.append([(c.request.request_id, c.num_tokens) for c in batch.chunks])
        self.on_run()
        assert self.gate.acquire(timeout=WAIT_SECONDS)
        if self.failures:
            raise self.failures.pop()
        return [TOKEN] * sum(chunk.samples for chunk in batch.chunks)

    def settle(self) -> None:
        pass

    def close_gate(self) -> None:
        self.gate = threading.Semaphore(0)


class Recorder:
    """A listener that keeps what it hears; ``on_progress`` may be made to fail."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, str] = {}
        self.refused: dict[str, Exception] = {}
        self.reserved: list[str] = []
        self.progress: list[tuple[str, int, RequestStatus]] = []
        self.loads: list[Load] = []
        self.fail_on_progress: Exception | None = None

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason
        self._notify()

    def on_reserved(self, request: Request) -> None:
        self.reserved.append(request.request_id)
        self._notify()

    def on_prompt_progress(self, request: Request) -> None:
        if self.fail_on_progress is not None:
            raise self.fail_on_progress
        self.progress.append((request.request_id, request.num_computed_tokens, request.status))
        self._notify()

    def on_refused(self, request_id: str, error: Exception) -> None:
        self.refused[request_id] = error
        self._notify()

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        self.loads.append(load)
        self._notify()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_SECONDS), (self.ended, self.refused)

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()


class Rig:
    def __init__(
        self, runner: ScriptedRunner, target_itl_seconds: float | None = None, **config: int
    ) -> None:
        self.runner = runner
        self.heard = Recorder()
        runner.on_run = self.heard._notify
        scheduler_config = SchedulerConfig(**config)
        self.engine = Engine(runner, scheduler_config, self.heard, target_itl_seconds)  # type: ignore[arg-type]

    def add(self, request_id: str, num_prompt: int = 6, max_tokens: int = 3, **more: Any) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.engine.add(Request(request_id, [1] * num_prompt, sampling, **more))

    def look(self, function: Callable[[Scheduler], Any]) -> Any:
        """Evaluate on the engine thread."""
        found: list[Any] = []
        self.engine.call(
            lambda scheduler: (found.append(function(scheduler)), self.heard._notify())
        )
        self.heard.wait_until(lambda: bool(found))
        return found[0]

    def assert_idle(self) -> None:
        def look(scheduler: Scheduler) -> tuple[int, int]:
            scheduler.check()
            return len(scheduler.queues), scheduler.pool.num_free

        assert self.look(look) == (0, self.runner.cache.num_blocks)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(ScriptedRunner(), max_batch_tokens=16)
    rig.engine.start()
    yield rig
    rig.runner.gate.release(1000)
    rig.engine.stop()
    assert not rig.engine._thread.is_alive()


def test_runs_requests_to_their_end(rig: Rig) -> None:
    rig.add("a")
    rig.add("b", max_tokens=1)
    rig.heard.wait_until(lambda: rig.heard.ended.keys() >= {"a", "b"})
    assert rig.heard.tokens == {"a": [TOKEN] * 3, "b": [TOKEN]}
    assert rig.heard.ended == {"a": "length", "b": "length"}
    rig.assert_idle()
    assert rig.engine.stats.num_generated_tokens == 4
    assert rig.engine.stats.num_prompt_tokens == 6 + 2  # the first block of both is the same
    assert rig.engine.stats.num_cached_tokens == 4


def test_an_idle_engine_reports_its_free_blocks_before_any_request(rig: Rig) -> None:
    rig.heard.wait_until(lambda: bool(rig.heard.loads))
    assert rig.heard.loads[0].num_free_blocks == rig.runner.cache.num_blocks


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(rig: Rig) -> None:
    rig.runner.failures = [RuntimeError("out of memory")]
    rig.add("a")
    rig.heard.wait_until(lambda: "a" in rig.heard.refused)
    assert str(rig.heard.refused["a"]) == "out of memory"
    rig.assert_idle()
    rig.add("b")
    rig.heard.wait_until(lambda: "b" in rig.heard.ended)
    assert rig.engine.is_healthy
    assert rig.engine.stats.step_failures == 1
    assert rig.engine.stats.step_failures_in_a_row == 0


def test_failures_in_a_row_are_unhealthy(rig: Rig) -> None:
    rig.runner.failures = [RuntimeError("broken") for _ in range(3)]
    for name in "abc":
        assert rig.engine.is_healthy
        rig.add(name)
        rig.heard.wait_until(lambda name=name: name in rig.heard.refused)
    assert not rig.engine.is_healthy


def test_a_prefill_keeps_its_blocks_through_a_failed_step(rig: Rig) -> None:
    """A transfer may be reading what earlier steps computed."""
    rig.engine.add(Request("p", [1] * 20, None))
    rig.heard.wait_until(lambda: bool(rig.heard.progress))
    rig.heard.wait_until(lambda: rig.heard.progress[-1][2] is RequestStatus.SENDING)
    assert [done for _, done, _ in rig.heard.progress] == [16, 20]
    rig.engine.abort("p")
    rig.assert_idle()
    rig.runner.failures = [RuntimeError("broken")]
    rig.engine.add(Request("q", [2] * 20, None))
    rig.heard.wait_until(lambda: "q" in rig.heard.refused)
    assert rig.look(lambda scheduler: scheduler.pool.num_free) == 32 - 5
    rig.engine.abort("q")
    rig.assert_idle()


def test_an_abort_between_steps_stops_a_stream(rig: Rig) -> None:
    rig.runner.close_gate()
    rig.add("a", max_tokens=100)
    rig.runner.gate.release(2)
    rig.heard.wait_until(lambda: len(rig.runner.batches) == 3)  # a third step is under way
    rig.engine.abort("a")
    rig.runner.gate.release(1000)
    rig.assert_idle()
    num_tokens = len(rig.heard.tokens["a"])
    assert num_tokens == 3
    rig.add("b")
    rig.heard.wait_until(lambda: "b" in rig.heard.ended)
    assert len(rig.heard.tokens["a"]) == num_tokens
    assert "a" not in rig.heard.ended


def test_a_full_queue_and_a_used_id_are_refused_at_once() -> None:
    rig = Rig(ScriptedRunner(), max_num_requests=1, max_waiting_requests=2)
    rig.runner.close_gate()
    rig.engine.start()
    rig.add("a", max_tokens=2)
    rig.heard.wait_until(lambda: bool(rig.runner.batches))  # it runs, and so waits no more
    for name in ("a", "b"):
        rig.add(name)
    with pytest.raises(WorkerBusyError, match="2 requests are waiting"):
        rig.add("c")  # though the step in progress has not ended
    rig.runner.gate.release(1000)
    rig.heard.wait_until(lambda: "a" in rig.heard.refused)
    assert isinstance(rig.heard.refused["a"], ValueError)
    rig.heard.wait_until(lambda: rig.heard.ended.keys() >= {"a", "b"})
    rig.assert_idle()
    rig.engine.stop()


def test_an_engine_that_dies_answers_everybody_now_and_later(rig: Rig) -> None:
    """A bug outside the step must not leave clients waiting until the replica is replaced."""
    rig.heard.fail_on_progress = ValueError("a bug")
    rig.engine.add(Request("r", [1] * 9, SamplingParams(max_tokens=1), PrefillPath.REMOTE))
    rig.heard.wait_until(lambda: rig.heard.reserved == ["r"])
    rig.engine.add(Request("p", [1] * 5, None))
    rig.heard.wait_until(lambda: rig.heard.refused.keys() >= {"r", "p"})
    assert not rig.engine.is_healthy
    rig.engine.abort("r")
    rig.add("later")
    rig.heard.wait_until(lambda: "later" in rig.heard.refused)
    assert str(rig.heard.refused["later"]) == "a bug"


def test_a_step_that_hangs_is_unhealthy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.runner.close_gate()
    rig.add("a")
    rig.heard.wait_until(lambda: bool(rig.runner.batches))
    assert rig.engine.is_healthy
    monkeypatch.setattr(engine_module, "_MAX_STEP_SECONDS", 0.0)
    assert not rig.engine.is_healthy
    rig.runner.gate.release(1000)
    rig.heard.wait_until(lambda: "a" in rig.heard.ended)
    rig.look(lambda scheduler: None)  # the step is over
    assert rig.engine.is_healthy


def test_the_load_counts_what_came_during_a_long_step_before_the_next_one(rig: Rig) -> None:
    rig.runner.close_gate()
    rig.engine.add(Request("a", [2] * 8, SamplingParams(max_tokens=1)))
    rig.heard.wait_until(lambda: bool(rig.runner.batches))
    assert rig.heard.loads[-1].num_queued_tokens == 8
    rig.add("b", num_prompt=40)
    rig.engine.add(Request("r", [3] * 9, SamplingParams(max_tokens=1), PrefillPath.REMOTE))
    num_loads = len(rig.heard.loads)
    rig.runner.gate.release(1)
    rig.heard.wait_until(lambda: len(rig.runner.batches) == 2)
    load = rig.heard.loads[num_loads]
    assert load.num_queued_tokens == 40, "what a prefill worker computes is not queued here"
    assert load.num_running == 2


def test_stop_ends_an_idle_engine_and_one_that_never_ran() -> None:
    Rig(ScriptedRunner()).engine.stop()
    rig = Rig(ScriptedRunner())
    rig.engine.start()
    rig.engine.stop()
    assert not rig.engine.is_healthy


@pytest.mark.parametrize(("target", "beside"), [(None, 60), (0.32, 41)])
def test_a_target_keeps_prompts_beside_streams_short(
    monkeypatch: pytest.MonkeyPatch, target: float | None, beside: int
) -> None:
    """On a clock where a step takes 80 ms and 5 ms for each of its prompt tokens."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock.now)

    runner = ScriptedRunner(num_blocks=64)
    rig = Rig(runner, target_itl_seconds=target, max_batch_tokens=61)

    def take_time() -> None:
        num_prompt = sum(n for _, n in runner.batches[-1] if n > 1)
        clock.now += 0.08 + 0.005 * num_prompt
        if len(runner.batches) == 12:
            rig.add("prompt", num_prompt=180, max_tokens=1)
        rig.heard._notify()

    runner.on_run = take_time
    rig.engine.start()
    rig.add("stream", num_prompt=20, max_tokens=40)
    rig.heard.wait_until(lambda: rig.heard.ended.keys() >= {"stream", "prompt"})
    assert runner.batches[0] == [("stream", 20)]
    prompts = [dict(batch).get("prompt", 0) for batch in runner.batches]
    sizes = [size for size in prompts if size]
    assert sum(sizes) == 160  # the stream's 20 tokens are the same, and cached
    # 0.9 x 320 ms less 80 ms are 41 tokens. The first piece shows what a token costs.
    assert sizes[1:-1] == [pytest.approx(beside, abs=3)] * len(sizes[1:-1])
    assert len(sizes) >= 3
    load = rig.heard.loads[-1]
    assert load.decode_base_seconds + load.decode_stream_seconds == pytest.approx(0.08)
    assert load.num_streams == load.num_decoding == 0
    rig.assert_idle()
    rig.engine.stop()
