"""Gives requests their blocks and takes them back, by way of the prefix cache.

    reserve    blocks for all that is known of a request, cached ones first; all or nothing
    hash       a prompt's blocks, by which it is found what prompts have in common
    catch_up   blocks that others have computed since, in place of its own without KV
    grow       one more when the output needs it
    publish    full blocks, so that later prompts find them
    release    all of them

Nothing else changes a block table. Whom to serve, and whom to preempt, the scheduler decides.
"""

from collections.abc import Iterable

from antiphon.block_hash import BlockHash
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

    def hash(self, request: Request) -> None:
        """Hash the blocks of a prompt that can be found or shared."""
        if self._prefix_cache:
            request.extend_hashes(self._num_findable(request), self._pool.block_size)

    def catch_up(self, request: Request) -> int:
        """Take cached blocks in place of its own without KV, which become free.

        Nothing is taken in the middle of a block: what has KV may be on its way to another worker,
        and so stays where it is.

        Returns:
            Tokens that need no computing any more; one that samples always has some left.
        """
        size = self._pool.block_size
        first, begun = divmod(request.num_computed_tokens, size)
        found = [] if begun else self._match(request, first)
        if found:
            places = slice(first, first + len(found))
            self._pool.acquire(found)
            self._pool.release(request.block_table[places])
            request.block_table[places] = found
            request.num_computed_tokens += len(found) * size
            request.num_published_blocks = places.stop
        return len(found) * size

    def next_hash(self, request: Request) -> BlockHash | None:
        """Which block would let ``catch_up`` move a prompt on; None: none can."""
        first, begun = divmod(request.num_computed_tokens, self._pool.block_size)
        if begun or not self._prefix_cache or first >= self._num_findable(request):
            return None
        return request.block_hashes[first]

    def next_hashes(self, request: Request, num_tokens: int) -> list[BlockHash]:
        """Which blocks can be found once the next ``num_tokens`` of a prompt have KV."""
        if not self._prefix_cache:
            return []
        size, start = self._pool.block_size, request.num_computed_tokens
        num_full = (start + num_tokens) // size
        request.extend_hashes(num_full, size)
        return request.block_hashes[start // size : num_full]

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

    def _match(self, request: Request, first: int = 0) -> list[BlockId]:
        if not self._prefix_cache:
            return []
        self.hash(request)
        return self._pool.match(request.block_hashes[first : self._num_findable(request)])

    def _num_findable(self, request: Request) -> int:
        # The last token must be computed, for its logits; a prefill-only request needs none.
        usable = request.num_tokens - (0 if request.is_prefill_only else 1)
        return usable // self._pool.block_size

    def _num_blocks(self, request: Request) -> int:
        return -(-request.num_tokens // self._pool.block_size)
