"""Iteration-level scheduling: every step hands out tokens to compute, within a budget.

One scheduler serves all roles. A decode step, a chunk of a prompt and the recomputation after a
preemption are the same thing in different amounts: ``num_computed_tokens`` catches up with
``num_tokens``. Decode steps come first and always run, so running streams don't stall; prompts
share the rest of the budget, packed without padding. A limit that depends on the number of decode
steps may narrow what prompts get beside them.

Blocks for a whole prompt are taken at admission, all or nothing; only output grows. When it cannot
grow, the youngest generating request is preempted and later recomputed. A request whose KV comes
from elsewhere is admitted the same way, so its blocks are reserved before anybody computes for it.

Pure Python: no torch, no threads, no clock of its own. A step is ``schedule`` then ``complete``;
the times that they are given go to the requests' timelines and decide nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antiphon.errors import WorkerBusyError
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.block_pool import BlockId, BlockPool
from antiphon.workers.request import PrefillPath, Request, RequestStatus


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of one worker."""

    max_batch_tokens: int = 512  # per step; decode steps run even above it
    max_num_requests: int = 64  # running at once, or about to: with KV on its way
    max_waiting_requests: int = 256
    max_awaiting_kv: int = 32
    prefix_cache: bool = True


class Scheduler:
    """First come, first served; the oldest request always makes progress.

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
        self._prompt_limit = prompt_limit
        self._requests: dict[str, Request] = {}
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Request] = {}  # in order of admission
        self._newly_reserved: list[Request] = []
        self._newly_prefilled: list[Request] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of prompts, found in the prefix cache

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that compute in steps."""
        return len(self._running)

    @property
    def num_awaiting_kv(self) -> int:
        """Requests whose blocks are reserved for KV from elsewhere."""
        return sum(r.status is RequestStatus.AWAITING_KV for r in self._requests.values())

    @property
    def num_streams(self) -> int:
        """Requests that sample: waiting, awaiting KV or running."""
        return sum(not r.is_prefill_only for r in self._requests.values())

    @property
    def num_decoding(self) -> int:
        """Requests that get a token in every step."""
        return sum(r.is_decoding for r in self._running.values())

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that are yet to be computed here; not those that a prefill worker will."""
        waiting = (r for r in self._waiting.values() if r.path is not PrefillPath.REMOTE)
        queued = (*waiting, *self._running.values())
        return sum(r.num_remaining_tokens for r in queued if not r.is_decoding)

    @property
    def num_requests(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    @property
    def request_ids(self) -> list[str]:
        """Of the requests that are not finished, oldest first."""
        return list(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            WorkerBusyError: The queue is full; nothing was taken.
            ValueError: The id is in use.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id: {request.request_id!r} is already in use on this worker")
        if len(self._waiting) >= max(self.config.max_waiting_requests, 1):
            raise WorkerBusyError(f"{len(self._waiting)} requests are waiting here already")
        self._requests[request.request_id] = request
        self._waiting[request.request_id] = request

    def abort(self, request_id: str, *, keep_blocks: bool = False) -> Request | None:
        """Stop a request and free its blocks; None if it is unknown or finished.

        Args:
            request_id: Of the request to stop.
            keep_blocks: A transfer still reads its blocks; abort it once more when that has ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)
        if keep_blocks and request.block_table:
            request.status = RequestStatus.SENDING
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
        request = self._requests.get(request_id)
        if request is None or request.status is not RequestStatus.AWAITING_KV:
            return None
        request.path = path
        request.num_computed_tokens = max(num_tokens, request.num_computed_tokens)
        if request.num_remaining_tokens == 1:
            request.timeline.prompt_done_at = now
        self._publish(request)
        self._run(request)
        return request

    def take_reserved(self) -> list[Request]:
        """Requests that became AWAITING_KV since the last call."""
        reserved, self._newly_reserved = self._newly_reserved, []
        return reserved

    def take_prefilled(self) -> list[Request]:
        """Prefill-only requests that became SENDING since the last call."""
        prefilled, self._newly_prefilled = self._newly_prefilled, []
        return prefilled

    def schedule(self, now: float = 0.0) -> Batch | None:
        """Choose the next forward pass, or None when nothing can run."""
        self._grow_running()
        self._admit_waiting(now)
        decoding = [r for r in self._running.values() if r.is_decoding]
        budget = self._prompt_budget(len(decoding))
        chunks = [Chunk(r, r.num_computed_tokens, 1, True) for r in decoding]
        for request in self._running.values():
            if request.is_decoding:
                continue
            num_tokens = min(request.num_remaining_tokens, budget)
            if num_tokens <= 0:
                # The budget is below the number of decoding requests: let the oldest prompt crawl
                # rather than starve.
                if len(chunks) > len(decoding):
                    break
                num_tokens = 1
            samples = not request.is_prefill_only and num_tokens == request.num_remaining_tokens
            request.timeline.prefill_began_at = request.timeline.prefill_began_at or now
            chunks.append(Chunk(request, request.num_computed_tokens, num_tokens, samples))
            budget -= num_tokens
        return Batch(tuple(chunks)) if chunks else None

    def complete(self, batch: Batch, token_ids: Sequence[int], now: float) -> list[Request]:
        """Record a step.

        Args:
            batch: What ``schedule`` returned.
            token_ids: One sampled token per chunk with ``samples``, in order.
            now: When it ended.

        Returns:
            Requests that finished generating.
        """
        finished = []
        sampled = iter(token_ids)
        for chunk in batch.chunks:
            token_id = next(sampled) if chunk.samples else None
            request = chunk.request
            if request.status is not RequestStatus.RUNNING:
                continue  # aborted while the batch was running
            request.num_computed_tokens += chunk.num_tokens
            self._publish(request)
            if token_id is not None:
                request.output_token_ids.append(token_id)
                if request.finish_reason is not None:
                    self._finish(request)
                    finished.append(request)
            elif request.is_prefill_only and request.num_remaining_tokens == 0:
                self._end_prefill(request)
            elif request.is_decoding:
                request.timeline.prompt_done_at = now
        return finished

    def check(self) -> None:
        """Assert that every block is accounted for (for tests and idle workers)."""
        self.pool.check()
        held = {b for r in self._requests.values() for b in r.block_table}
        assert self.pool.num_free == self.pool.num_blocks - len(held), "a block leaked"
        for request in self._waiting.values():
            assert request.status is RequestStatus.WAITING
            assert not request.block_table
        for request in self._running.values():
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed_tokens <= len(request.block_table) * self.pool.block_size

    def _prompt_budget(self, num_decoding: int) -> int:
        budget = self.config.max_batch_tokens - num_decoding
        limit = self._prompt_limit(num_decoding)
        return budget if limit is None else min(budget, limit)

    def _grow_running(self) -> None:
        """Give every running request room for its next token, preempting the youngest."""
        for request in tuple(self._running.values()):
            while request.status is RequestStatus.RUNNING:
                missing = self._num_blocks(request) - len(request.block_table)
                if missing <= self.pool.num_free:
                    request.block_table += self.pool.allocate(missing)
                    break
                self._preempt_youngest()

    def _admit_waiting(self, now: float) -> None:
        num_awaiting = self.num_awaiting_kv if self._waiting else 0
        for request in tuple(self._waiting.values()):
            if len(self._running) + num_awaiting >= self.config.max_num_requests:
                return
            is_remote = request.path is PrefillPath.REMOTE
            if is_remote and num_awaiting >= self.config.max_awaiting_kv:
                continue  # those that need no prefill worker do not wait for one
            if not self._reserve(request):
                return
            request.timeline.reserved_at = request.timeline.reserved_at or now
            self._admit(request)
            num_awaiting += request.status is RequestStatus.AWAITING_KV

    def _admit(self, request: Request) -> None:
        """Start a request that has its blocks."""
        del self._waiting[request.request_id]
        is_remote = request.path is PrefillPath.REMOTE
        # One token is left for the decode step, so that much may be missing without a hand-off.
        if is_remote and request.num_remaining_tokens > 1:
            request.status = RequestStatus.AWAITING_KV
            self._newly_reserved.append(request)
        elif request.is_prefill_only and request.num_remaining_tokens == 0:
            self._end_prefill(request)
        else:
            request.path = PrefillPath.LOCAL if is_remote else request.path
            self._run(request)

    def _reserve(self, request: Request) -> bool:
        """Take blocks for every known token, reusing cached ones. All or nothing."""
        cached = self._match(request)
        total = self._num_blocks(request)
        free = self.pool.num_free - self.pool.num_unused(cached)
        # Leave each running request a block to grow into, or it would be preempted at once.
        if total - len(cached) > free - len(self._running):
            return False
        self.pool.acquire(cached)
        request.block_table = cached + self.pool.allocate(total - len(cached))
        request.num_computed_tokens = len(cached) * self.pool.block_size
        request.num_published_blocks = len(cached)
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_cached_tokens += request.num_cached_tokens
        return True

    def _match(self, request: Request) -> list[BlockId]:
        if not self.config.prefix_cache:
            return []
        # The last token must be computed, for its logits; a prefill-only request needs none.
        usable = request.num_tokens - (0 if request.is_prefill_only else 1)
        num_blocks = usable // self.pool.block_size
        request.extend_hashes(num_blocks, self.pool.block_size)
        return self.pool.match(request.block_hashes[:num_blocks])

    def _publish(self, request: Request) -> None:
        if not self.config.prefix_cache:
            return
        num_full = request.num_computed_tokens // self.pool.block_size
        request.extend_hashes(num_full, self.pool.block_size)
        for index in range(request.num_published_blocks, num_full):
            self.pool.publish(request.block_table[index], request.block_hashes[index])
        request.num_published_blocks = max(num_full, request.num_published_blocks)

    def _end_prefill(self, request: Request) -> None:
        self._running.pop(request.request_id, None)
        request.status = RequestStatus.SENDING
        self._newly_prefilled.append(request)

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        self._running[request.request_id] = request

    def _preempt_youngest(self) -> None:
        victim = next(r for r in reversed(self._running.values()) if not r.is_prefill_only)
        del self._running[victim.request_id]
        self._release(victim)
        victim.status = RequestStatus.WAITING
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.timeline.restart()
        self.num_preemptions += 1
        if victim.path is PrefillPath.REMOTE:
            victim.path = PrefillPath.LOCAL  # what was sent is gone; recompute it here
        self._waiting[victim.request_id] = victim
        self._waiting.move_to_end(victim.request_id, last=False)

    def _finish(self, request: Request) -> None:
        self._running.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)
        self._release(request)
        request.status = RequestStatus.FINISHED

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_published_blocks = 0

    def _num_blocks(self, request: Request) -> int:
        return -(-request.num_tokens // self.pool.block_size)
