"""Blocks of requests: all or nothing, cached ones first, and none lost."""

import random

import pytest

from antiphon.messages import SamplingParams
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.block_tables import BlockTables
from antiphon.workers.request import Request


def request(name: str, num_prompt: int) -> Request:
    return Request(name, list(range(num_prompt)), SamplingParams(max_tokens=100))


def computed(tables: BlockTables, name: str, num_prompt: int) -> Request:
    """A request whose prompt was computed and published."""
    one = request(name, num_prompt)
    assert tables.reserve(one, num_left_free=0)
    one.num_computed_tokens = num_prompt
    tables.publish(one)
    return one


def test_blocks_are_taken_for_the_whole_prompt_or_not_at_all() -> None:
    pool = BlockPool(4, 4)
    tables = BlockTables(pool, prefix_cache=True)
    a, b = request("a", 9), request("b", 5)
    assert tables.reserve(a, num_left_free=1)
    assert len(a.block_table) == 3
    assert not tables.reserve(b, num_left_free=0)
    assert (b.block_table, pool.num_free) == ([], 1)
    tables.release(a)
    assert not tables.reserve(b, num_left_free=3)
    assert tables.reserve(b, num_left_free=2)
    tables.check([b])


def test_a_prefix_is_shared_and_the_last_token_is_left_to_compute() -> None:
    pool = BlockPool(8, 4)
    tables = BlockTables(pool, prefix_cache=True)
    first = computed(tables, "a", 8)
    same, longer, prefill = request("b", 8), request("c", 10), Request("d", list(range(8)), None)
    for one, num_shared in ((same, 1), (longer, 2), (prefill, 2)):  # prefill-only: no logits
        assert tables.reserve(one, num_left_free=0)
        assert one.num_computed_tokens == 4 * num_shared
        assert one.block_table[:num_shared] == first.block_table[:num_shared]
        assert one.block_table[num_shared:] != first.block_table[num_shared:] or num_shared == 2
    tables.check([first, same, longer, prefill])
    assert pool.num_free == 8 - 2 - 1 - 1


def test_without_a_prefix_cache_nothing_is_found() -> None:
    tables = BlockTables(BlockPool(8, 4), prefix_cache=False)
    computed(tables, "a", 8)
    again = request("b", 8)
    assert tables.reserve(again, num_left_free=0)
    assert again.num_computed_tokens == 0


def test_output_grows_into_a_new_block_until_there_is_none() -> None:
    pool = BlockPool(2, 4)
    tables = BlockTables(pool, prefix_cache=True)
    a = computed(tables, "a", 4)
    assert tables.grow(a)
    assert len(a.block_table) == 1  # it still fits
    for num_blocks in (2, 2, 2, 2):
        a.output_token_ids.append(7)
        assert tables.grow(a)
        assert len(a.block_table) == num_blocks
    a.output_token_ids.append(7)
    assert not tables.grow(a)
    assert len(a.block_table) == 2


def test_released_blocks_are_found_until_somebody_needs_them() -> None:
    pool = BlockPool(3, 4)
    tables = BlockTables(pool, prefix_cache=True)
    tables.release(computed(tables, "a", 8))
    assert pool.num_free == 3
    again = request("b", 9)
    assert tables.reserve(again, num_left_free=0)
    assert again.num_computed_tokens == 8
    tables.release(again)
    other = Request("c", [99] * 12, SamplingParams(max_tokens=1))
    assert tables.reserve(other, num_left_free=0)
    tables.release(other)
    late = request("d", 9)
    assert tables.reserve(late, num_left_free=0)
    assert late.num_computed_tokens == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_random_requests_leave_no_block_behind(seed: int, prefix_cache: bool) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(4, 12), rng.choice([1, 2, 4]))
    tables = BlockTables(pool, prefix_cache=prefix_cache)
    held: list[Request] = []
    for index in range(200):
        if held and rng.random() < 0.4:
            tables.release(held.pop(rng.randrange(len(held))))
        elif held and rng.random() < 0.5:
            one = rng.choice(held)
            one.output_token_ids.append(rng.randint(0, 1))
            if tables.grow(one):
                one.num_computed_tokens = one.num_tokens
                tables.publish(one)
            else:
                one.output_token_ids.pop()
        else:
            new = request(str(index), rng.randint(1, 12))
            if tables.reserve(new, num_left_free=rng.randint(0, 2)):
                held.append(new)
        tables.check(held)
    for one in held:
        tables.release(one)
    tables.check([])
    assert pool.num_free == pool.num_blocks
