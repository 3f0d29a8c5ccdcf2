"""What a GPU has not run yet when a step ends, told by stand-ins that queue it.

The stand-in's blocks hold the id of the request that wrote to them last.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from antiphon.errors import StepAbandonedError
from antiphon.messages import SamplingParams
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.decode_graphs import DecodeGraphs, cuda_graph_capture
from antiphon.workers.engine import Engine
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.scheduler import SchedulerConfig

NUM_BLOCKS, BLOCK_SIZE = 8, 4


class QueueingRunner:
    """Its steps end early, so what they write is queued; ``settle`` lets it happen."""

    def __init__(self, error: Exception) -> None:
        self.cache = SimpleNamespace(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.num_graph_steps = 0
        self.blocks: dict[int, str] = {}
        self._error = error
        self._queued: dict[int, str] = {}

    def run(self, batch: Batch, is_abandoned: Callable[[], bool]) -> list[int]:
        for chunk in batch.chunks:
            self._queued.update(dict.fromkeys(chunk.request.block_table, chunk.request.request_id))
        raise self._error

    def settle(self) -> None:
        self.blocks.update(self._queued)
        self._queued.clear()


class Listener:
    """Writes received KV as soon as it is told of blocks."""

    def __init__(self, runner: QueueingRunner) -> None:
        self._runner = runner
        self.reserved: list[Request] = []

    def on_reserved(self, request: Request) -> None:
        self.reserved.append(request)
        self._runner.blocks.update(dict.fromkeys(request.block_table, request.request_id))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *report: None


@pytest.mark.parametrize("error", [StepAbandonedError("all left"), RuntimeError("a bug")])
def test_no_step_writes_to_blocks_after_they_were_given_to_a_hand_off(error: Exception) -> None:
    runner = QueueingRunner(error)
    listener = Listener(runner)
    engine = Engine(runner, SchedulerConfig(max_batch_tokens=8), listener)  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=1)
    engine.add(Request("left", [1] * 24, sampling))
    engine._apply_commands(wait=False)
    batch = engine._schedule()
    assert batch is not None
    engine._step(batch)
    engine.abort("left")
    engine.add(Request("remote", [2] * 24, sampling, PrefillPath.REMOTE))
    engine._apply_commands(wait=False)
    engine._schedule()
    runner.settle()  # whatever is still queued happens some time
    (remote,) = listener.reserved
    assert {runner.blocks[block_id] for block_id in remote.block_table} == {"remote"}


class NotingCuda:
    """Stands in for ``torch.cuda`` on the engine's thread; notes which stream does what."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.pools: list[object] = []
        self.num_streams = 0
        self._entered = ["engine"]

    def Stream(self) -> Any:
        self.num_streams += 1
        return SimpleNamespace(name="warm-up", wait_stream=lambda other: None)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.lines.append(f"{self._entered[-1]} replays"))

    def current_stream(self, device: torch.device | None = None) -> Any:
        name = self._entered[-1]
        return SimpleNamespace(
            wait_stream=lambda other: None,
            synchronize=lambda: self.lines.append(f"host waits for {name} of {device}"),
        )

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return self._enter(stream.name)

    def graph_pool_handle(self) -> object:
        return object()

    def graph(self, graph: Any, pool: object = None) -> contextlib.AbstractContextManager[None]:
        self.pools.append(pool or object())  # torch makes one for each that is given none
        return self._enter("capture")

    @contextlib.contextmanager
    def _enter(self, name: str) -> Iterator[None]:
        self._entered.append(name)
        yield
        self._entered.pop()


def _runner(device: str) -> ModelRunner:
    layer = SimpleNamespace(num_kv_heads=1, k_head_dim=8, v_head_dim=8)
    kernels = SimpleNamespace(prepare=lambda shape: None)
    layout = SimpleNamespace(layers=(layer,), dtype=torch.float32)
    model: Any = SimpleNamespace(
        device=torch.device(device), kernels=kernels, num_q_heads=1, layout=layout
    )
    cache: Any = SimpleNamespace(layout=layout)
    return ModelRunner(model, cache)


def test_what_is_waited_for_is_the_stream_of_steps_and_of_replayed_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = NotingCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    replay = cuda_graph_capture()(lambda: torch.zeros(1))
    replay()
    _runner("cuda:1").settle()
    assert cuda.lines == ["engine replays", "host waits for engine of cuda:1"]
    _runner("cpu").settle()
    assert len(cuda.lines) == 2


def test_a_step_without_samples_is_over_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is measured of it is the time to launch it."""
    cuda = NotingCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    runner = _runner("cuda:1")
    monkeypatch.setattr(runner, "_logits", lambda *step: cuda.lines.append("engine computes"))
    prompt = Request("prompt", [1] * 9, None)
    assert runner.run(Batch((Chunk(prompt, 0, 8, samples=False),))) == []
    assert cuda.lines == ["engine computes", "host waits for engine of cuda:1"]


def test_captured_steps_share_one_pool_of_memory_and_one_stream_to_warm_up_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = NotingCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    batch: Any = None
    DecodeGraphs(lambda _: torch.zeros(1), lambda _: batch, (1, 2, 4), cuda_graph_capture())
    assert len(cuda.pools) == 3
    assert len(set(cuda.pools)) == 1
    assert cuda.num_streams == 1
