"""Runs a real engine thread and collects what it reports."""

import threading
from collections import defaultdict
from dataclasses import dataclass

import torch
from kv_contents import fill_with_garbage

from antiphon.block_hash import BlockHash
from antiphon.messages import Load, RequestOutput, SamplingParams
from antiphon.workers.attention_interface import ATTENTION_NAME
from antiphon.workers.engine import Engine
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.request import Request
from antiphon.workers.scheduler import Scheduler, SchedulerConfig

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class EngineShape:
    """What an equality test varies."""

    block_size: int = 16
    num_blocks: int = 64
    max_batch_tokens: int = 512
    max_num_requests: int = 64
    scatter: bool = False  # shuffle the free list, so that no context is contiguous

    @property
    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(self.max_batch_tokens, self.max_num_requests)


class Collector:
    """An EngineListener that keeps everything."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finish_reasons: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.refused: dict[str, Exception] = {}
        self.load: Load | None = None

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        with self.changed:
            for output in outputs:
                self.tokens[output.request_id] += output.token_ids
                self.cached.setdefault(output.request_id, output.num_cached_tokens)
                if output.finish_reason:
                    self.finish_reasons[output.request_id] = output.finish_reason
            self.changed.notify_all()

    def on_reserved(self, request: Request) -> None:
        raise AssertionError("no hand-off was asked for")

    def on_prompt_progress(self, request: Request) -> None:
        raise AssertionError("no prefill was asked for")

    def on_refused(self, request_id: str, error: Exception) -> None:
        with self.changed:
            self.refused[request_id] = error
            self.changed.notify_all()

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        with self.changed:
            self.load = load
            self.changed.notify_all()

    def wait_for(self, *request_ids: str) -> None:
        ended = self.finish_reasons.keys() | self.refused.keys()

        def all_ended() -> bool:
            nonlocal ended
            ended = self.finish_reasons.keys() | self.refused.keys()
            return ended >= set(request_ids)

        with self.changed:
            assert self.changed.wait_for(all_ended, WAIT_SECONDS), f"ended: {sorted(ended)}"


class EngineHarness:
    """An engine over a model, for a ``with`` block; checks for leaks at its end."""

    def __init__(self, model: PagedModel, shape: EngineShape) -> None:
        self.listener = Collector()
        model.model.set_attn_implementation(ATTENTION_NAME)  # the oracle shares the weights
        cache = KVCache(
            model.layout, shape.num_blocks, shape.block_size, model.device, model.kernels
        )
        fill_with_garbage(cache)
        self.runner = ModelRunner(model, cache)
        self.engine = Engine(self.runner, shape.scheduler, self.listener)
        if shape.scatter:
            self.engine.call(_shuffle_free_blocks)

    def __enter__(self) -> "EngineHarness":
        self.engine.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.on_engine(check_idle)
        self.engine.stop()

    def generate(self, prompts: dict[str, list[int]], max_tokens: int) -> dict[str, list[int]]:
        """Run prompts together, greedily, and return their tokens."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        for request_id, prompt in prompts.items():
            self.engine.add(Request(request_id, prompt, sampling))
        self.listener.wait_for(*prompts)
        assert not self.listener.refused, self.listener.refused
        return {request_id: self.listener.tokens[request_id] for request_id in prompts}

    def on_engine(self, function: object) -> None:
        """Run a check on the engine thread and raise here what it raises there."""
        done = threading.Event()
        errors: list[BaseException] = []

        def run(scheduler: Scheduler) -> None:
            try:
                function(scheduler)  # type: ignore[operator]
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self.engine.call(run)
        assert done.wait(WAIT_SECONDS)
        if errors:
            raise errors[0]


def check_idle(scheduler: Scheduler) -> None:
    scheduler.check()
    assert len(scheduler.queues) == 0
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def _shuffle_free_blocks(scheduler: Scheduler) -> None:
    order = torch.randperm(scheduler.pool.num_blocks, generator=torch.Generator().manual_seed(1))
    blocks = scheduler.pool.allocate(scheduler.pool.num_blocks)
    scheduler.pool.release([blocks[i] for i in order.tolist()])
