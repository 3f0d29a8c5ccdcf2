"""Which worker holds which KV blocks: chained block hashes mapped to bit masks of workers.

A (worker, block) pair is in one of three states:

    absent ──speculate──▶ expected ──add──▶ confirmed
       ▲                     │                 │
       └──expire, remove─────┴─────remove──────┘

*Expected* blocks belong to prompts on their way: without them, a burst of prompts with one prefix
would be scattered before the first telemetry about it arrives. Only ``add`` (telemetry) confirms;
what is not confirmed within ``ttl_seconds`` never came and is forgotten.

One integer per hash has a bit for each worker, so that one dictionary look-up per block answers for
all workers; a chained hash stands for the whole prefix, so no tree is needed.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from antiphon.block_hash import BlockHash


class PrefixIndex:
    """An index of the prefix caches of many workers.

    Args:
        ttl_seconds: How long an expected block waits for its confirmation.
    """

    def __init__(self, ttl_seconds: float = 10.0) -> None:
        self._ttl_seconds = ttl_seconds
        self._workers: dict[int, str] = {}  # by bit
        self._bits: dict[str, int] = {}
        self._all_bits = 0
        self._masks: dict[BlockHash, int] = {}  # confirmed or expected
        self._expected_masks: dict[BlockHash, int] = {}
        self._confirmed: dict[str, set[BlockHash]] = {}
        self._expected: dict[str, dict[BlockHash, float]] = {}  # hash -> expires_at
        self._expiries: deque[tuple[float, str, Sequence[BlockHash]]] = deque()

    @property
    def num_blocks(self) -> int:
        """Distinct blocks that some worker holds or is about to hold."""
        return len(self._masks)

    def num_confirmed(self, worker: str) -> int:
        """Blocks that ``worker`` reported and still holds."""
        return len(self._confirmed.get(worker, ()))

    def num_expected(self, worker: str) -> int:
        """Blocks that ``worker`` should hold soon, because of prompts on their way."""
        return len(self._expected.get(worker, ()))

    def add(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        """Enter blocks that ``worker`` reported; confirms expected ones."""
        bit = self._bit_of(worker)
        confirmed, expected, masks = self._confirmed[worker], self._expected[worker], self._masks
        for block_hash in hashes:
            confirmed.add(block_hash)
            masks[block_hash] = masks.get(block_hash, 0) | bit
            if expected and expected.pop(block_hash, None) is not None:
                _clear(self._expected_masks, block_hash, bit)

    def remove(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        """Forget blocks that ``worker`` evicted; unknown ones are ignored."""
        bit = self._bits.get(worker, 0)
        confirmed, expected = self._confirmed.get(worker, set()), self._expected.get(worker, {})
        for block_hash in hashes:
            if block_hash in confirmed:
                confirmed.discard(block_hash)
                _clear(self._masks, block_hash, bit)
            elif expected.pop(block_hash, None) is not None:
                _clear(self._masks, block_hash, bit)
                _clear(self._expected_masks, block_hash, bit)

    def drop(self, worker: str) -> None:
        """Forget ``worker`` and all its blocks; an unknown worker is ignored."""
        bit = self._bits.pop(worker, 0)
        if not bit:
            return
        del self._workers[bit]
        self._all_bits ^= bit
        for block_hash in self._confirmed.pop(worker):
            _clear(self._masks, block_hash, bit)
        for block_hash in self._expected.pop(worker):
            _clear(self._masks, block_hash, bit)
            _clear(self._expected_masks, block_hash, bit)

    def speculate(self, worker: str, hashes: Sequence[BlockHash], now: float) -> None:
        """Enter the blocks of a prompt on its way to ``worker``, until ``now`` + TTL.

        Args:
            worker: Where the prompt goes.
            hashes: The prompt's blocks; those that ``worker`` holds already stay confirmed.
            now: Seconds on any clock that does not go backwards.
        """
        bit = self._bit_of(worker)
        confirmed, expected = self._confirmed[worker], self._expected[worker]
        missing = [block_hash for block_hash in hashes if block_hash not in confirmed]
        if not missing:
            return
        expires_at = now + self._ttl_seconds
        for block_hash in missing:
            expected[block_hash] = expires_at
            self._masks[block_hash] = self._masks.get(block_hash, 0) | bit
            self._expected_masks[block_hash] = self._expected_masks.get(block_hash, 0) | bit
        self._expiries.append((expires_at, worker, missing))

    def expire(self, now: float) -> None:
        """Forget expected blocks that were not confirmed in time."""
        while self._expiries and self._expiries[0][0] <= now:
            expires_at, worker, hashes = self._expiries.popleft()
            expected = self._expected.get(worker)
            # A later prompt with the same prefix prolongs a block: only its last expiry counts.
            if expected:
                self.remove(worker, [h for h in hashes if expected.get(h) == expires_at])

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Return how many leading blocks of ``hashes`` each worker holds or is about to hold.

        Workers without the first block are left out.
        """
        depths: dict[str, int] = {}
        alive, get = self._all_bits, self._masks.get
        for depth, block_hash in enumerate(hashes):
            kept = get(block_hash, 0) & alive
            if kept != alive:
                if depth:
                    self._record(depths, alive ^ kept, depth)
                alive = kept
                if not alive:
                    break
        if hashes:
            self._record(depths, alive, len(hashes))
        return depths

    def confirmed_part(self, hashes: Sequence[BlockHash], depths: dict[str, int]) -> dict[str, int]:
        """Reduce the result of ``match`` to the leading blocks that workers have reported."""
        if self._expected_masks.keys().isdisjoint(hashes):
            return depths
        confirmed = {w: self._num_confirmed_of(w, hashes[:depth]) for w, depth in depths.items()}
        return {worker: depth for worker, depth in confirmed.items() if depth}

    def check(self) -> None:
        """Assert the invariants (for tests)."""
        masks: dict[BlockHash, int] = {}
        expected_masks: dict[BlockHash, int] = {}
        for worker, bit in self._bits.items():
            assert self._workers[bit] == worker, f"bit {bit} of {worker} is taken"
            confirmed, expected = self._confirmed[worker], self._expected[worker]
            assert confirmed.isdisjoint(expected), f"{worker} expects what it holds"
            for block_hash in confirmed | expected.keys():
                masks[block_hash] = masks.get(block_hash, 0) | bit
            for block_hash in expected:
                expected_masks[block_hash] = expected_masks.get(block_hash, 0) | bit
        assert len(self._workers) == len(self._bits)
        assert sum(self._workers) == self._all_bits
        assert masks == self._masks, "masks and the workers' own blocks disagree"
        assert expected_masks == self._expected_masks, "expected masks and blocks disagree"
        scheduled = {(worker, at) for at, worker, _ in self._expiries}
        for worker, blocks in self._expected.items():
            assert {(worker, at) for at in blocks.values()} <= scheduled, "a block never expires"

    def _num_confirmed_of(self, worker: str, hashes: Sequence[BlockHash]) -> int:
        expected = self._expected[worker]
        if expected.keys().isdisjoint(hashes):
            return len(hashes)
        return next(depth for depth, h in enumerate(hashes) if h in expected)

    def _record(self, depths: dict[str, int], bits: int, depth: int) -> None:
        while bits:
            lowest = bits & -bits
            depths[self._workers[lowest]] = depth
            bits ^= lowest

    def _bit_of(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            bit = ~self._all_bits & (self._all_bits + 1)  # the lowest one that is free
            self._all_bits |= bit
            self._bits[worker] = bit
            self._workers[bit] = worker
            self._confirmed[worker] = set()
            self._expected[worker] = {}
        return bit


def _clear(masks: dict[BlockHash, int], block_hash: BlockHash, bit: int) -> None:
    left = masks[block_hash] & ~bit
    if left:
        masks[block_hash] = left
    else:
        del masks[block_hash]
