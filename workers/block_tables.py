"""Gives requests their blocks and takes them back, by way of the prefix cache.

    reserve    blocks for all that is known of a request, cached ones first; all or nothing
    grow       one more when the output needs it
    publish    full blocks, so that later prompts find them
    release    all of them

Nothing else changes a block table. Whom to serve, and whom to preempt, the scheduler decides.
"""

from collections.abc import Iterable

from antiphon.workers.block_pool import BlockId, BlockPool
from antiphon.workers.request import Request


class BlockTables:
    """The tables are the requests' own.

    Args:
        pool: Whose blocks are handed out.
        prefix_cache: Whether blocks are found again and published.
    """

    def __init__(self, pool: BlockPool, *, prefix_cache: bool) -> None:
        self._pool = pool
        self._prefix_cache = prefix_cache

    def reserve(self, request: Request, num_left_free: int) -> bool:
        """Take blocks for every known token, reusing cached ones.

        Args:
            request: Without blocks; then ``num_computed_tokens`` are those in cached ones.
            num_left_free: Blocks that must be free afterwards.

        Returns:
            Whether there was room; nothing was taken otherwise.
        """
        pool = self._pool
        cached = self._match(request)
        num_new = self._num_blocks(request) - len(cached)
        if num_new > pool.num_free - pool.num_unused(cached) - num_left_free:
            return False
        pool.acquire(cached)
        request.block_table = cached + pool.allocate(num_new)
        request.num_computed_tokens = len(cached) * pool.block_size
        request.num_published_blocks = len(cached)
        return True

    def grow(self, request: Request) -> bool:
        """Make room for every known token; False if the pool has none, and nothing was taken."""
        num_missing = self._num_blocks(request) - len(request.block_table)
        if num_missing > self._pool.num_free:
            return False
        request.block_table += self._pool.allocate(num_missing)
        return True

    def publish(self, request: Request) -> None:
        """Let later prompts find the blocks whose KV is complete."""
        if not self._prefix_cache:
            return
        num_full = request.num_computed_tokens // self._pool.block_size
        request.extend_hashes(num_full, self._pool.block_size)
        for index in range(request.num_published_blocks, num_full):
            self._pool.publish(request.block_table[index], request.block_hashes[index])
        request.num_published_blocks = max(num_full, request.num_published_blocks)

    def release(self, request: Request) -> None:
        """Take all blocks back; published ones stay findable until somebody needs the room."""
        self._pool.release(request.block_table)
        request.block_table = []
        request.num_published_blocks = 0

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that these requests hold every block that is not free, and enough of them."""
        self._pool.check()
        held: set[BlockId] = set()
        for request in requests:
            held.update(request.block_table)
            assert request.num_computed_tokens <= len(request.block_table) * self._pool.block_size
        assert self._pool.num_free == self._pool.num_blocks - len(held), "a block leaked"

    def _match(self, request: Request) -> list[BlockId]:
        if not self._prefix_cache:
            return []
        # The last token must be computed, for its logits; a prefill-only request needs none.
        usable = request.num_tokens - (0 if request.is_prefill_only else 1)
        num_blocks = usable // self._pool.block_size
        request.extend_hashes(num_blocks, self._pool.block_size)
        return self._pool.match(request.block_hashes[:num_blocks])

    def _num_blocks(self, request: Request) -> int:
        return -(-request.num_tokens // self._pool.block_size)
