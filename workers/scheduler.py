"""Iteration-level scheduling: every step hands out tokens to compute, within a budget.

One scheduler serves all roles. A decode step, a chunk of a prompt and the recomputation after a
preemption are the same thing in different amounts: ``num_computed_tokens`` catches up with
``num_tokens``. Decode steps come first and always run, so running streams don't stall; prompts
share the rest of the budget, packed without padding. A limit that depends on the number of decode
steps may narrow what prompts get beside them. What prompts begin with alike is computed once:
``prompt_chunks`` lets the younger ones wait, and before the next step they find it in the cache.

Blocks for a whole prompt are taken at admission; only output grows. When it cannot grow, the
youngest generating request is preempted and later recomputed; a request is as old as its arrival.
Blocks that KV is written to or sent from cannot be taken from anybody: if younger requests hold
such, an older one that could only give up its own keeps them, and waits until those are received or
sent. A request whose KV comes from elsewhere is admitted as others are, so its blocks are reserved
before anybody computes for it.

Pure Python: no torch, no threads, no clock of its own. A step is ``schedule`` then ``complete``;
the times that they are given go to the requests' timelines and decide nothing.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.block_tables import BlockTables
from antiphon.workers.prompt_chunks import PromptBudget, num_distinct_tokens, prompt_chunks
from antiphon.workers.request import PrefillPath, Request, RequestStatus
from antiphon.workers.request_queues import RequestQueues

# A rest of a prompt that is no longer than this goes along where a limit would cut it off: on one
# CPU core a step with prompt tokens costs as much as 25 of them before the first.
_MAX_REST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of one worker."""

    max_batch_tokens: int = 512  # per step; decode steps run even above it
    max_num_requests: int = 64  # running at once, or about to: with KV on its way
    max_waiting_requests: int = 256  # seen to before a request gets here
    max_awaiting_kv: int = 32
    prefix_cache: bool = True


class Scheduler:
    """First come, first served; the oldest request waits for nothing but hand-offs.

    Args:
        config: Bounds.
        pool: Whose blocks are handed out.
        prompt_limit: Prompt tokens that a step may have beside a number of decode steps; None: as
            many as the budget holds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        prompt_limit: Callable[[int], int | None] = lambda _: None,
    ) -> None:
        self.config = config
        self.pool = pool
        self.queues = RequestQueues()
        self._tables = BlockTables(pool, prefix_cache=config.prefix_cache)
        self._prompt_limit = prompt_limit
        self._prompts: list[Request] = []  # that had tokens to compute in the last step
        self._newly_reserved: list[Request] = []
        self._progressed: list[Request] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of prompts, found in the prefix cache

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that are yet to be computed here, those of a shared block once."""
        return num_distinct_tokens(self.queues.prompts, self.pool.block_size)

    def add(self, request: Request) -> None:
        """Queue a request; raises what ``RequestQueues.add`` does."""
        self.queues.add(request)
        self._tables.hash(request)  # so that prompts with one prefix count once while they wait

    def abort(self, request_id: str, *, keep_blocks: bool = False) -> Request | None:
        """Stop a request and free its blocks; None if it is unknown or finished.

        Args:
            request_id: Of the request to stop.
            keep_blocks: A transfer still reads its blocks; abort it once more when that has ended.
        """
        request = self.queues.get(request_id)
        if request is None:
            return None
        if keep_blocks and request.block_table:
            self.queues.move(request, RequestStatus.SENDING)
        else:
            self._finish(request)
        return request

    def kv_arrived(
        self, request_id: str, num_tokens: int, path: PrefillPath, now: float
    ) -> Request | None:
        """KV of the first ``num_tokens`` tokens is in place; compute the rest here.

        Returns:
            The request; None if it was stopped.
        """
        request = self.queues.get(request_id)
        if request is None or request.status is not RequestStatus.AWAITING_KV:
            return None
        request.path = path
        request.num_computed_tokens = max(num_tokens, request.num_computed_tokens)
        if request.num_remaining_tokens == 1:
            request.timeline.prompt_done_at = now
        self._tables.publish(request)
        self.queues.move(request, RequestStatus.RUNNING)
        self._prompts.append(request)
        return request

    def take_reserved(self) -> list[Request]:
        """Requests that became AWAITING_KV since the last call."""
        reserved, self._newly_reserved = self._newly_reserved, []
        return reserved

    def take_progressed(self) -> list[Request]:
        """Prefill-only requests that got KV, or became SENDING, since the last call."""
        progressed, self._progressed = self._progressed, []
        return progressed

    def schedule(self, now: float = 0.0) -> Batch | None:
        """Choose the next forward pass, or None when nothing can run."""
        self._catch_up(now)
        stuck = self._grow_running()
        self._admit_waiting(now)
        running: Collection[Request] = self.queues.running
        if stuck:
            running = [request for request in running if request not in stuck]
        chunks = [Chunk(r, r.num_computed_tokens, 1, True) for r in running if r.is_decoding]
        self._prompts = [request for request in running if not request.is_decoding]
        budget = self._prompt_budget(len(chunks))
        chunks += prompt_chunks(self._prompts, budget, self._tables, now)
        return Batch(tuple(chunks)) if chunks else None

    def complete(self, batch: Batch, token_ids: Sequence[int], now: float) -> None:
        """Record a step.

        Args:
            batch: What ``schedule`` returned.
            token_ids: One sampled token per chunk with ``samples``, in order.
            now: When it ended.
        """
        sampled = iter(token_ids)
        for chunk in batch.chunks:
            token_id = next(sampled) if chunk.samples else None
            request = chunk.request
            if request.status is not RequestStatus.RUNNING:
                continue  # aborted while the batch was running
            request.num_computed_tokens += chunk.num_tokens
            self._tables.publish(request)
            if token_id is not None:
                request.output_token_ids.append(token_id)
                if request.finish_reason is not None:
                    self._finish(request)
            else:
                self._move_prompt_on(request, now)

    def check(self) -> None:
        """Assert that every block is accounted for (for tests and idle workers)."""
        self.queues.check()
        self._tables.check(self.queues)
        assert not any(request.block_table for request in self.queues.waiting)

    def _prompt_budget(self, num_decoding: int) -> PromptBudget:
        budget = self.config.max_batch_tokens - num_decoding
        limit = self._prompt_limit(num_decoding)
        if limit is None or limit >= budget:
            return PromptBudget(budget)
        return PromptBudget(limit, min(budget - limit, _MAX_REST_TOKENS))

    def _catch_up(self, now: float) -> None:
        """Spare prompts what others have computed since the last step."""
        for request in self._prompts:
            if request.status is not RequestStatus.RUNNING or request.is_decoding:
                continue
            if num_found := self._tables.catch_up(request):
                self._count_cached(request, num_found)
                self._move_prompt_on(request, now)

    def _count_cached(self, request: Request, num_tokens: int) -> None:
        if not request.num_preemptions:
            request.num_cached_tokens += num_tokens
            self.num_cached_tokens += num_tokens

    def _move_prompt_on(self, request: Request, now: float) -> None:
        """More of a prompt has KV."""
        if request.is_prefill_only:
            self._progressed.append(request)
            if request.num_remaining_tokens == 0:
                self.queues.move(request, RequestStatus.SENDING)
        elif request.is_decoding:
            request.timeline.prompt_done_at = now

    def _grow_running(self) -> set[Request]:
        """Give every running request room for its next token.

        Returns:
            Those that get none in this step, and keep their blocks.
        """
        stuck: set[Request] = set()
        for request in self.queues.running:
            while request.status is RequestStatus.RUNNING and not self._tables.grow(request):
                if not self._preempt_for(request):
                    stuck.add(request)
                    break
        return stuck

    def _preempt_for(self, request: Request) -> bool:
        """Preempt the youngest generating request, at last the one that wants room.

        Returns:
            False if nobody was: younger ones hold blocks that they give back, or will soon be
            preempted for. KV is on its way there, or being computed or sent for a hand-off.
        """
        is_youngest = True
        for other in reversed(self.queues):
            if other is request:
                break
            if other.status is RequestStatus.RUNNING and not other.is_prefill_only:
                self._preempt(other)
                return True
            is_youngest = is_youngest and not other.block_table
        if is_youngest:
            self._preempt(request)
        return is_youngest

    def _admit_waiting(self, now: float) -> None:
        queues = self.queues
        num_running, num_awaiting = queues.num_running, queues.num_awaiting_kv
        for request in queues.waiting:
            if num_running + num_awaiting >= self.config.max_num_requests:
                return
            is_remote = request.path is PrefillPath.REMOTE
            if is_remote and num_awaiting >= self.config.max_awaiting_kv:
                continue  # those that need no prefill worker do not wait for one
            # Leave each of these a block to grow into, or somebody would be preempted at once.
            if not self._tables.reserve(request, num_left_free=num_running + num_awaiting):
                return
            self._admit(request, now)
            num_running, num_awaiting = queues.num_running, queues.num_awaiting_kv

    def _admit(self, request: Request, now: float) -> None:
        """Start a request that has its blocks."""
        request.timeline.reserved_at = request.timeline.reserved_at or now
        self._count_cached(request, request.num_computed_tokens)
        is_remote = request.path is PrefillPath.REMOTE
        # One token is left for the decode step, so that much may be missing without a hand-off.
        if is_remote and request.num_remaining_tokens > 1:
            self.queues.move(request, RequestStatus.AWAITING_KV)
            self._newly_reserved.append(request)
        elif request.is_prefill_only and request.num_remaining_tokens == 0:
            self._move_prompt_on(request, now)
        else:
            request.path = PrefillPath.LOCAL if is_remote else request.path
            self.queues.move(request, RequestStatus.RUNNING)

    def _preempt(self, victim: Request) -> None:
        self._tables.release(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.timeline.restart()
        self.num_preemptions += 1
        if victim.path is PrefillPath.REMOTE:
            victim.path = PrefillPath.LOCAL  # what was sent is gone; recompute it here
        self.queues.put_back(victim)

    def _finish(self, request: Request) -> None:
        self._tables.release(request)
        self.queues.move(request, RequestStatus.FINISHED)
