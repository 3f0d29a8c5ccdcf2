import random

import pytest

from antiphon.block_hash import BlockHash, hash_blocks
from antiphon.router.prefix_index import PrefixIndex

TTL = 10.0


def hashes(*names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def test_match_stops_at_each_workers_first_missing_block():
    index = PrefixIndex()
    index.add("a", hashes("1", "2", "3"))
    index.add("b", hashes("1", "3"))
    index.add("c", hashes("2", "3"))
    assert index.match(hashes("1", "2", "3", "4")) == {"a": 3, "b": 1}
    assert index.match([]) == {}
    index.check()


def test_removed_blocks_and_dropped_workers_are_forgotten():
    index = PrefixIndex()
    index.add("a", hashes("1", "2"))
    index.add("b", hashes("1", "2"))
    index.remove("a", hashes("2", "unknown"))
    index.drop("b")
    index.drop("b")
    index.remove("b", hashes("1"))
    assert index.match(hashes("1", "2")) == {"a": 1}
    assert index.num_blocks == 1
    index.check()


def test_a_new_worker_does_not_inherit_blocks_with_a_dropped_ones_bit():
    index = PrefixIndex()
    index.add("a", hashes("1"))
    index.add("b", hashes("1"))
    index.drop("a")
    index.add("c", hashes("2"))
    assert index.match(hashes("1", "2")) == {"b": 1}
    index.check()


def test_expected_blocks_count_until_they_expire():
    index = PrefixIndex(TTL)
    index.speculate("a", hashes("1", "2"), now=0.0)
    found = index.match(hashes("1", "2"))
    assert found == {"a": 2}
    assert index.confirmed_part(hashes("1", "2"), found) == {}
    index.expire(now=TTL - 0.1)
    assert index.match(hashes("1", "2")) == {"a": 2}
    index.expire(now=TTL)
    assert index.match(hashes("1", "2")) == {}
    assert index.num_blocks == 0
    index.check()


def test_a_confirmed_block_outlives_its_expectation():
    index = PrefixIndex(TTL)
    index.speculate("a", hashes("1", "2", "3"), now=0.0)
    index.add("a", hashes("1", "2"))
    found = index.match(hashes("1", "2", "3"))
    assert found == {"a": 3}
    assert index.confirmed_part(hashes("1", "2", "3"), found) == {"a": 2}
    index.expire(now=TTL)
    assert index.match(hashes("1", "2", "3")) == {"a": 2}
    index.check()


def test_a_later_prompt_prolongs_an_expectation():
    index = PrefixIndex(TTL)
    index.speculate("a", hashes("1", "2"), now=0.0)
    index.speculate("a", hashes("1"), now=5.0)
    index.expire(now=TTL)
    assert index.match(hashes("1", "2")) == {"a": 1}
    index.expire(now=TTL + 5.0)
    assert index.match(hashes("1", "2")) == {}
    index.check()


def test_expectations_of_a_dropped_worker_do_not_outlive_its_return():
    index = PrefixIndex(TTL)
    index.speculate("a", hashes("1"), now=0.0)
    index.drop("a")
    index.speculate("a", hashes("1"), now=3.0)
    index.expire(now=TTL)
    assert index.match(hashes("1")) == {"a": 1}
    index.check()


def test_equal_tokens_after_different_prefixes_are_different_blocks():
    index = PrefixIndex()
    index.add("a", hash_blocks([1, 2, 3, 4], 2))
    assert index.match(hash_blocks([9, 9, 3, 4], 2)) == {}
    assert index.match(hash_blocks([1, 2, 9, 9], 2)) == {"a": 1}


class NaiveIndex:
    """The same contract from sets and loops."""

    def __init__(self) -> None:
        self.confirmed: dict[str, set[BlockHash]] = {}
        self.expected: dict[str, dict[BlockHash, float]] = {}

    def of(self, worker):
        return self.confirmed.setdefault(worker, set()), self.expected.setdefault(worker, {})

    def add(self, worker, blocks):
        confirmed, expected = self.of(worker)
        confirmed.update(blocks)
        for block in blocks:
            expected.pop(block, None)

    def remove(self, worker, blocks):
        confirmed, expected = self.of(worker)
        for block in blocks:
            confirmed.discard(block)
            expected.pop(block, None)

    def drop(self, worker):
        self.confirmed.pop(worker, None)
        self.expected.pop(worker, None)

    def speculate(self, worker, blocks, now):
        confirmed, expected = self.of(worker)
        expected.update({block: now + TTL for block in blocks if block not in confirmed})

    def expire(self, now):
        for expected in self.expected.values():
            for block in [block for block, at in expected.items() if at <= now]:
                del expected[block]

    def match(self, blocks, only_confirmed):
        depths = {}
        for worker in self.confirmed:
            held = set(self.confirmed[worker])
            if not only_confirmed:
                held |= self.expected[worker].keys()
            depth = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
            if depth:
                depths[worker] = depth
        return depths


@pytest.mark.parametrize("seed", range(40))
def test_behaves_like_sets_under_random_use(seed):
    rng = random.Random(seed)
    index, naive, now = PrefixIndex(TTL), NaiveIndex(), 0.0
    workers = [f"worker-{i}" for i in range(rng.randint(1, 70))]
    chains = [hash_blocks([chain] * 12, 1) for chain in range(3)]
    for _ in range(150):
        now += rng.choice([0.0, 0.1, 3.0])
        worker, chain = rng.choice(workers), rng.choice(chains)
        some = rng.sample(chain, rng.randint(0, len(chain)))
        prefix = chain[: rng.randint(0, len(chain))]
        action = rng.choice(["add", "add", "remove", "speculate", "speculate", "expire", "drop"])
        match action:
            case "add" | "remove":
                blocks = rng.choice([some, prefix])
                getattr(index, action)(worker, blocks)
                getattr(naive, action)(worker, blocks)
            case "speculate":
                index.speculate(worker, prefix, now)
                naive.speculate(worker, prefix, now)
            case "expire":
                index.expire(now)
                naive.expire(now)
            case "drop":
                index.drop(worker)
                naive.drop(worker)
        index.check()
        found = index.match(chain)
        assert found == naive.match(chain, only_confirmed=False)
        assert index.confirmed_part(chain, found) == naive.match(chain, only_confirmed=True)
        assert index.num_confirmed(worker) == len(naive.confirmed.get(worker, ()))
        assert index.num_expected(worker) == len(naive.expected.get(worker, ()))
