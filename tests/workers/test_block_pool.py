import random

import pytest

from antiphon.block_hash import BlockHash
from antiphon.workers.block_pool import BlockPool

A, B, C = BlockHash(b"a"), BlockHash(b"b"), BlockHash(b"c")


def test_reuses_a_prefix_and_evicts_lru() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    first, second = pool.allocate(2)
    pool.publish(first, A)
    pool.publish(second, B)
    pool.release([first, second])
    assert pool.match([A, B]) == [first, second]
    pool.allocate(2)  # the never-used block, then the tail of the prefix
    assert pool.match([A, B]) == [first]
    pool.check()


def test_is_all_or_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    with pytest.raises(AssertionError, match="3 blocks of 2 free ones"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_shared_block_returns_with_its_last_reference() -> None:
    pool = BlockPool(num_blocks=1, block_size=4)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], A)
    pool.acquire(pool.match([A]))
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_changes_are_reported_in_net_effect() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], A)
    pool.publish(blocks[1], B)
    assert pool.drain_changes() == ([A, B], [])
    pool.release(blocks)
    reused = pool.allocate(1)  # evicts B
    pool.publish(reused[0], C)
    assert pool.drain_changes() == ([C], [B])
    assert pool.drain_changes() == ([], [])


@pytest.mark.parametrize("seed", range(100))
def test_followed_by_its_changes_a_mirror_always_matches(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=8, block_size=1)
    held: list[list[int]] = []
    mirror: set[bytes] = set()
    for _ in range(200):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        elif pool.num_free:
            blocks = pool.allocate(rng.randint(1, pool.num_free))
            for block in blocks:
                if rng.random() < 0.8:
                    pool.publish(block, BlockHash(bytes([rng.randrange(12)])))
            held.append(blocks)
        if rng.random() < 0.3:
            stored, removed = pool.drain_changes()
            mirror = (mirror - set(removed)) | set(stored)
            assert mirror == set(pool.cached_hashes())
        pool.check()
