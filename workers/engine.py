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
from collections.abc import Callable
from typing import Protocol

from antiphon.block_hash import BlockHash
from antiphon.errors import StepAbandonedError, WorkerBusyError
from antiphon.messages import Load, RequestOutput
from antiphon.workers.batch import Batch
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.engine_stats import EngineStats
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.scheduler import Scheduler, SchedulerConfig
from antiphon.workers.step_outputs import first_token_timings, step_outputs
from antiphon.workers.step_times import StepTimes
from antiphon.workers.timeline import Handoff

logger = logging.getLogger(__name__)

_MAX_STEP_FAILURES = 3  # in a row; then the worker says it is unhealthy
# Of an idle engine the share of prompts in its last seconds falls, which it goes on saying for 20 s
# at most. At a share of 0.02, which changes a prediction by 2 %, it falls silent.
_IDLE_REPORT_SECONDS = 1.0
_SILENT_SHARE = 0.02
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
        self._step_times = StepTimes(target_itl_seconds, config.max_batch_tokens)
        self.pool = BlockPool(runner.cache.num_blocks, runner.cache.block_size)
        self._scheduler = Scheduler(config, self.pool, self._step_times.prompt_limit)
        self._listener = listener
        # Each has one writer; their difference is what waits to be applied.
        self._num_added = self._num_entered = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None  # what ended the loop
        self._aborting: set[str] = set()  # aborts that wait for the step to end
        self._progress_at: float | None = None  # of what it does now; None: it waits for work
        self.last_load = self.load(self._scheduler)
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
        hangs = self.last_step_age_seconds > _MAX_STEP_SECONDS
        failed = self._failure or self.stats.step_failures_in_a_row >= _MAX_STEP_FAILURES
        return self._thread.is_alive() and not hangs and not failed

    @property
    def last_step_age_seconds(self) -> float:
        """Since the last step began, while there is work; 0 while there is none."""
        progress_at = self._progress_at
        return 0.0 if progress_at is None else time.monotonic() - progress_at

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, those included that came during the step."""
        return self._scheduler.queues.num_waiting + self._num_added - self._num_entered

    def check_room(self) -> None:
        """Raise ``WorkerBusyError`` if the queue is full; waits for no step."""
        if self.num_waiting >= (self._scheduler.config.max_waiting_requests or 1):
            raise WorkerBusyError(f"{self.num_waiting} requests are waiting here already")

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
        queues = scheduler.queues
        prompt_tokens, prompt_gap = self._step_times.prompt_step(queues.num_decoding)
        return Load(
            num_running=queues.num_running + queues.num_awaiting_kv,
            num_waiting=queues.num_waiting,
            num_free_blocks=scheduler.pool.num_free,
            num_queued_tokens=scheduler.num_queued_tokens,
            prefill_tokens_per_second=self.stats.prefill_tokens_per_second,
            decode_step_seconds=self.stats.decode_step_seconds,
            num_streams=queues.num_streams,
            num_decoding=queues.num_decoding,
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
        self._report_load([], [])  # all blocks are free
        while self._apply_commands(wait=not is_busy):
            self._progress_at = time.monotonic()
            batch = self._schedule()
            # Before the step: what came during the last one is in this load, not in that.
            self._report_load(*self._scheduler.pool.drain_changes())
            if batch is not None:
                self._step(batch)
            else:
                self._progress_at = None
            is_busy = batch is not None

    def _report_load(self, stored: list[BlockHash], removed: list[BlockHash]) -> None:
        self.last_load = self.load(self._scheduler)
        self._listener.on_changed(stored, removed, self.last_load)

    def _refuse_everything(self, error: Exception) -> None:
        """Answer what is here and whatever still comes, so that nobody waits for ever."""
        for request in tuple(self._scheduler.queues):
            with contextlib.suppress(Exception):  # the listener may be what failed
                self._listener.on_refused(request.request_id, error)
        while (command := self._commands.get()) is not None:
            with contextlib.suppress(Exception):  # the scheduler may be what failed
                command()

    def _apply_commands(self, *, wait: bool) -> bool:
        """Apply what has piled up, waiting for the first if there is nothing else to do.

        False: the engine is to stop.
        """
        has_news = self.last_load.prompt_share > _SILENT_SHARE
        try:
            command = self._commands.get(wait, _IDLE_REPORT_SECONDS if has_news else None)
            self._progress_at = self._progress_at or time.monotonic()
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
        except ValueError as error:
            self._listener.on_refused(request.request_id, error)

    def _abort(self, request_id: str, keep_blocks: bool) -> None:
        self._aborting.discard(request_id)
        self._scheduler.abort(request_id, keep_blocks=keep_blocks)

    def _schedule(self) -> Batch | None:
        batch = self._scheduler.schedule(time.monotonic())
        if reserved := self._scheduler.take_reserved():
            # Kernels of a step that ended early may still write to blocks that were freed since.
            self._runner.settle()
        for request in reserved:
            self._listener.on_reserved(request)
        self._report_progress()
        return batch

    def _report_progress(self) -> None:
        for request in self._scheduler.take_progressed():
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
        timings = first_token_timings(batch, started, now)
        self._scheduler.complete(batch, token_ids, now)
        self._measure(batch, now - started, now)
        self._report_progress()
        if outputs := step_outputs(batch, token_ids, timings):
            self._listener.on_outputs(outputs)

    def _is_abandoned(self, batch: Batch) -> bool:
        aborting = self._aborting
        return bool(aborting) and all(c.request.request_id in aborting for c in batch.chunks)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """End the requests of a failed step honestly; the others go on."""
        logger.exception("a step of %d requests failed", len(batch.chunks))
        self.stats.fail()
        for chunk in batch.chunks:
            request = chunk.request
            self._scheduler.abort(request.request_id, keep_blocks=request.is_prefill_only)
            self._listener.on_refused(request.request_id, error)

    def _measure(self, batch: Batch, seconds: float, now: float) -> None:
        num_decoding, num_prompt = self.stats.record(batch, seconds)
        self._step_times.record(num_decoding, num_prompt, seconds, now)
        self.stats.num_preemptions = self._scheduler.num_preemptions
        self.stats.num_cached_tokens = self._scheduler.num_cached_tokens
        self.stats.num_graph_steps = self._runner.num_graph_steps
