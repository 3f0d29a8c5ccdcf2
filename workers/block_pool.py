"""Fixed pool of KV-cache blocks with reference counts and prefix reuse.

A block is in exactly one state:

    free    ref_count == 0, no hash     in ``_free``, at the front
    cached  ref_count == 0, has a hash  in ``_free``, evictable, findable by hash
    used    ref_count  > 0              in no list; may have a hash

``_free`` is ordered least recently used first. It is an ``OrderedDict`` and not a ``deque`` because
a prefix hit takes a block out of the middle in O(1).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NewType

from antiphon.block_hash import BlockHash

BlockId = NewType("BlockId", int)


class BlockPool:
    """Hands out block ids; owns no tensors.

    Args:
        num_blocks: Number of blocks on this worker.
        block_size: Tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._free = OrderedDict.fromkeys(BlockId(i) for i in range(num_blocks))
        self._stored: list[BlockHash] = []
        self._removed: list[BlockHash] = []
        self.num_cached = 0  # of the free ones, findable by hash

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can return now, cached ones included."""
        return len(self._free)

    @property
    def counts(self) -> dict[str, int]:
        """Blocks by state; from any thread, so a block that moves now may count twice."""
        num_free, num_cached = len(self._free), self.num_cached
        held = self.num_blocks - num_free
        return {"held": held, "cached": num_cached, "free": num_free - num_cached}

    def match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Longest cached prefix of ``hashes``. Changes nothing; ``acquire`` it to keep it."""
        hit: list[BlockId] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            hit.append(block_id)
        return hit

    def num_unused(self, block_ids: Sequence[BlockId]) -> int:
        """How many of ``block_ids`` would leave the free list if they were acquired."""
        return sum(1 for block_id in block_ids if self._ref_counts[block_id] == 0)

    def acquire(self, block_ids: Sequence[BlockId]) -> None:
        """Add one reference to each block found by ``match``."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:  # it has a hash, by which it was found
                del self._free[block_id]
                self.num_cached -= 1
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Take blocks, evicting the least recently used cached ones.

        Args:
            num_blocks: At most ``num_free``, which is for the caller to see to.
        """
        assert num_blocks <= len(self._free), f"{num_blocks} blocks of {len(self._free)} free ones"
        taken = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in taken:
            self._evict(block_id)
            self._ref_counts[block_id] = 1
        return taken

    def publish(self, block_id: BlockId, block_hash: BlockHash) -> None:
        """Make a full block findable by its hash; the first block with a hash keeps it."""
        if self._hashes[block_id] is None and block_hash not in self._by_hash:
            self._by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash
            self._stored.append(block_hash)

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Drop one reference to each block; the tail becomes evictable before the head."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)
                else:
                    self.num_cached += 1

    def cached_hashes(self) -> list[BlockHash]:
        """Every hash that ``match`` can find now."""
        return list(self._by_hash)

    def drain_changes(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes that became findable and unfindable since the last call, in net effect."""
        stored = [h for h in self._stored if h in self._by_hash]
        removed = [h for h in self._removed if h not in self._by_hash]
        self._stored, self._removed = [], []
        return stored, removed

    def check(self) -> None:
        """Assert the invariants above (for tests and idle workers)."""
        assert all(count >= 0 for count in self._ref_counts)
        assert {i for i, count in enumerate(self._ref_counts) if count == 0} == set(self._free)
        assert all(self._hashes[block_id] == h for h, block_id in self._by_hash.items())
        assert sum(h is not None for h in self._hashes) == len(self._by_hash)
        assert sum(self._hashes[block_id] is not None for block_id in self._free) == self.num_cached

    def _evict(self, block_id: BlockId) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block_id] = None
            self.num_cached -= 1
            self._removed.append(block_hash)
