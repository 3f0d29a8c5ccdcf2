"""The engine: one thread that schedules, computes and reports, beside the event loop.

Other threads talk to it through commands, which it applies between steps; it talks back through an
``EngineListener``, whose methods run on the engine thread and must return at once. So scheduler,
block pool and cache have one owner and need no locks.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from antiphon.errors import AntiphonError, StepAbandonedError, WorkerBusyError
from antiphon.messages import BlockHash, Load, RequestOutput, RequestTiming
from antiphon.workers.batch import Batch
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.scheduler import Scheduler, SchedulerConfig
from antiphon.workers.step_times import StepTimes
from antiphon.workers.timeline import Handoff

logger = logging.getLogger(__name__)

_RATE_SMOOTHING = 0.2  # weight of the newest step in the measured rates
_MIN_RATED_TOKENS = 32  # the fixed cost of a step hides the rate of smaller ones
_MAX_STEP_FAILURES = 3  # in a row; then the worker says it is unhealthy
_MAX_STEP_SECONDS = 300.0  # a step that takes longer hangs; a slow one on a CPU takes tens


class EngineListener(Protocol):
    """What the engine reports. Called on the engine thread; must not block or raise."""

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """New tokens of a step."""

    def on_reserved(self, request: Request) -> None:
        """Blocks are reserved for a request whose KV is to come from elsewhere."""

    def on_prompt_progress(self, request: Request) -> None:
        """A prefill-only request has KV for its first ``num_computed_tokens`` tokens."""

    def on_refused(self, request_id: str, error: Exception) -> None:
        """A request was not taken, or its step failed; it holds nothing any more."""

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        """Before every step and when there is nothing to do: what the router should know."""


@dataclass(slots=True)
class EngineStats:
    """Counters since the start; read from any thread."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed here
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    step_failures: int = 0
    step_failures_in_a_row: int = 0
    num_decode_steps: int = 0  # without prompt tokens
    num_graph_steps: int = 0  # of those, replayed from a captured graph
    decode_seconds: float = 0.0  # in those
    prefill_tokens_per_second: float = 0.0  # smoothed
    decode_step_seconds: float = 0.0  # smoothed


class Engine:
    """Runs requests to their end.

    Args:
        runner: Model and cache.
        config: Bounds of the scheduler.
        listener: Where reports go.
        target_itl_seconds: Prompts get what running streams leave of it; None: the whole budget.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: SchedulerConfig,
        listener: EngineListener,
        target_itl_seconds: float | None = None,
    ) -> None:
        self.stats = EngineStats()
        self._runner = runner
        self._step_times = StepTimes(target_itl_seconds)
        pool = BlockPool(runner.cache.num_blocks, runner.cache.block_size)
        self._scheduler = Scheduler(config, pool, self._step_times.prompt_limit)
        self._listener = listener
        # Each has one writer; their difference is what waits to be applied.
        self._num_added = self._num_entered = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None  # what ended the loop
        self._aborting: set[str] = set()  # aborts that wait for the step to end
        self._step_began_at: float | None = None
        self._thread = threading.Thread(target=self._loop, name="antiphon-engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Stop after the step in progress; unfinished requests are dropped with the thread."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and steps succeed, in bounded time."""
        began_at = self._step_began_at
        hangs = began_at is not None and time.monotonic() - began_at > _MAX_STEP_SECONDS
        failed = self._failure or self.stats.step_failures_in_a_row >= _MAX_STEP_FAILURES
        return self._thread.is_alive() and not hangs and not failed

    def check_room(self) -> None:
        """Raise ``WorkerBusyError`` if the queue is full; waits for no step."""
        num_waiting = self._scheduler.num_waiting + self._num_added - self._num_entered
        if num_waiting >= (self._scheduler.config.max_waiting_requests or 1):
            raise WorkerBusyError(f"{num_waiting} requests are waiting here already")

    def add(self, request: Request) -> None:
        """Queue a request, or raise as ``check_room`` does; from one thread only."""
        self.check_room()
        request.timeline.submitted_at = time.monotonic()
        self._num_added += 1
        self._commands.put(lambda: self._add(request))

    def abort(self, request_id: str, *, keep_blocks: bool = False) -> None:
        """Stop a request; see ``Scheduler.abort``. Unknown ids are ignored."""
        self._aborting.add(request_id)
        self._commands.put(lambda: self._abort(request_id, keep_blocks))

    def kv_arrived(self, request_id: str, num_tokens: int, handoff: Handoff) -> None:
        """KV of the first ``num_tokens`` tokens of an AWAITING_KV request is in the cache."""
        now = time.monotonic()

        def arrived() -> None:
            scheduler = self._scheduler
            if request := scheduler.kv_arrived(request_id, num_tokens, PrefillPath.REMOTE, now):
                request.timeline.handoff = handoff

        self._commands.put(arrived)

    def call(self, function: Callable[[Scheduler], None]) -> None:
        """Run a function on the engine thread between steps (snapshots, checks)."""
        self._commands.put(lambda: function(self._scheduler))

    def load(self, scheduler: Scheduler) -> Load:
        """How busy the engine is; on the engine thread only."""
        prompt_tokens, prompt_gap = self._step_times.prompt_step(
            scheduler.num_decoding, scheduler.config.max_batch_tokens
        )
        return Load(
            num_running=scheduler.num_running + scheduler.num_awaiting_kv,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=scheduler.pool.num_free,
            num_queued_tokens=scheduler.num_queued_tokens,
            prefill_tokens_per_second=self.stats.prefill_tokens_per_second,
            decode_step_seconds=self.stats.decode_step_seconds,
            num_streams=scheduler.num_streams,
            num_decoding=scheduler.num_decoding,
            decode_base_seconds=self._step_times.base_seconds,
            decode_stream_seconds=self._step_times.stream_seconds,
            prompt_gap_seconds=prompt_gap,
            prompt_gap_tokens=prompt_tokens,
            prompt_share=self._step_times.prompt_share(time.monotonic()),
        )

    def _loop(self) -> None:
        try:
            self._run_steps()
        except Exception as error:
            logger.exception("the engine failed; this worker refuses everything until replaced")
            self._failure = error
            self._refuse_everything(error)

    def _run_steps(self) -> None:
        is_busy = False
        self._listener.on_changed([], [], self.load(self._scheduler))  # all blocks are free
        while self._apply_commands(wait=not is_busy):
            batch = self._schedule()
            # Before the step: what came during the last one is in this load, not in that.
            stored, removed = self._scheduler.pool.drain_changes()
            self._listener.on_changed(stored, removed, self.load(self._scheduler))
            if batch is not None:
                self._step_began_at = time.monotonic()
                self._step(batch)
                self._step_began_at = None
            is_busy = batch is not None

    def _refuse_everything(self, error: Exception) -> None:
        """Answer what is here and whatever still comes, so that nobody waits for ever."""
        for request_id in self._scheduler.request_ids:
            with contextlib.suppress(Exception):  # the listener may be what failed
                self._listener.on_refused(request_id, error)
        while (command := self._commands.get()) is not None:
            with contextlib.suppress(Exception):  # the scheduler may be what failed
                command()

    def _apply_commands(self, *, wait: bool) -> bool:
        """Apply what has piled up, waiting for the first if there is nothing else to do."""
        try:
            command = self._commands.get(block=wait)
            while True:
                if command is None:
                    return False
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True

    def _add(self, request: Request) -> None:
        self._num_entered += 1
        if self._failure is not None:
            self._listener.on_refused(request.request_id, self._failure)
            return
        try:
            self._scheduler.add(request)
        except (AntiphonError, ValueError) as error:
            self._listener.on_refused(request.request_id, error)

    def _abort(self, request_id: str, keep_blocks: bool) -> None:
        self._aborting.discard(request_id)
        self._scheduler.abort(request_id, keep_blocks=keep_blocks)

    def _schedule(self) -> Batch | None:
        batch = self._scheduler.schedule(time.monotonic())
        for request in self._scheduler.take_reserved():
            self._listener.on_reserved(request)
        self._report_prefilled()
        return batch

    def _report_prefilled(self) -> None:
        for request in self._scheduler.take_prefilled():
            self._listener.on_prompt_progress(request)

    def _step(self, batch: Batch) -> None:
        started = time.monotonic()
        try:
            token_ids = self._runner.run(batch, lambda: self._is_abandoned(batch))
        except StepAbandonedError:
            return  # the aborts are the next commands
        except Exception as error:
            self._fail(batch, error)
            return
        now = time.monotonic()
        timings = {
            chunk.request.request_id: chunk.request.timeline.timing(
                chunk.request.path, (started, now), computes_prompt=chunk.num_tokens > 1
            )
            for chunk in batch.chunks
            if chunk.samples and not chunk.request.output_token_ids
        }
        self._scheduler.complete(batch, token_ids, now)
        self._measure(batch, now - started, now)
        self._report(batch, token_ids, timings)

    def _is_abandoned(self, batch: Batch) -> bool:
        aborting = self._aborting
        return bool(aborting) and all(c.request.request_id in aborting for c in batch.chunks)

    def _report(
        self, batch: Batch, token_ids: Sequence[int], timings: Mapping[str, RequestTiming]
    ) -> None:
        outputs = []
        sampled = iter(token_ids)
        for chunk in batch.chunks:
            request = chunk.request
            if chunk.samples:
                outputs.append(
                    RequestOutput(
                        request_id=request.request_id,
                        token_ids=[next(sampled)],
                        finish_reason=request.finish_reason,
                        num_cached_tokens=request.num_cached_tokens,
                        timing=timings.get(request.request_id),
                    )
                )
            elif request.is_prefill_only and request.num_remaining_tokens:
                self._listener.on_prompt_progress(request)
        self._report_prefilled()
        if outputs:
            self._listener.on_outputs(outputs)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """End the requests of a failed step honestly; the others go on."""
        logger.exception("a step of %d requests failed", len(batch.chunks))
        self.stats.step_failures += 1
        self.stats.step_failures_in_a_row += 1
        for chunk in batch.chunks:
            request = chunk.request
            self._scheduler.abort(request.request_id, keep_blocks=request.is_prefill_only)
            self._listener.on_refused(request.request_id, error)

    def _measure(self, batch: Batch, seconds: float, now: float) -> None:
        stats = self.stats
        num_sampled = sum(chunk.samples for chunk in batch.chunks)
        num_decoding = sum(chunk.samples and chunk.num_tokens == 1 for chunk in batch.chunks)
        num_prompt = sum(chunk.num_tokens for chunk in batch.chunks) - num_decoding
        self._step_times.record(num_decoding, num_prompt, seconds, now)
        stats.num_steps += 1
        stats.step_failures_in_a_row = 0
        stats.num_generated_tokens += num_sampled
        stats.num_prompt_tokens += num_prompt
        stats.num_preemptions = self._scheduler.num_preemptions
        if num_prompt == 0:
            stats.num_decode_steps += 1
            stats.num_graph_steps = self._runner.num_graph_steps
            stats.decode_seconds += seconds
            stats.decode_step_seconds = _smoothed(stats.decode_step_seconds, seconds)
        elif num_prompt >= max(_MIN_RATED_TOKENS, 8 * num_sampled):
            rate = num_prompt / seconds
            stats.prefill_tokens_per_second = _smoothed(stats.prefill_tokens_per_second, rate)


def _smoothed(old: float, new: float) -> float:
    return new if old == 0 else old + _RATE_SMOOTHING * (new - old)
