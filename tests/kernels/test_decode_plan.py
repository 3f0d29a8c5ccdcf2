"""A decode plan covers every context exactly once, evenly, in tensors of fixed sizes."""

import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode

CPU = torch.device("cpu")
CAPACITY = DecodeCapacity(num_items=33, block_n=64, members_per_item=4, shared_prefix_min_tokens=32)


def make_tables(seq_lens: list[int], shared: dict[int, int], block_size: int) -> list[list[int]]:
    """Distinct blocks but for the first ``shared[request]``, which are alike for all."""
    return [
        [
            block if block < shared.get(index, 0) else 1000 * (index + 1) + block
            for block in range(-(-length // block_size))
        ]
        for index, length in enumerate(seq_lens)
    ]


@settings(deadline=None, derandomize=True)
@given(
    seq_lens=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    shared=st.dictionaries(st.integers(0, 39), st.integers(0, 40), max_size=20),
    num_items=st.integers(1, 300),
)
def test_every_context_is_covered_once(
    seq_lens: list[int], shared: dict[int, int], num_items: int
) -> None:
    capacity = DecodeCapacity(num_items, 64, 4, 32)
    tables = make_tables(seq_lens, shared, 16)
    plan = plan_decode(seq_lens, tables, 16, capacity, CPU)
    offsets = plan.part_offsets.tolist()
    rows: list[tuple[int, int]] = []  # (request, workspace row)
    for request, part, num_parts, row in plan.items.tolist():
        if request >= 0:
            assert 0 <= part < num_parts
            rows.append((request, row))
    members = plan.members.tolist()
    for first, stop, part, num_parts, prefix_len in plan.shared_items.tolist():
        assert stop - first <= capacity.members_per_item
        assert 0 <= part < num_parts
        for member in members[first:stop]:
            assert plan.prefix_lens[member] == prefix_len
            assert prefix_len % 16 == 0
            assert prefix_len < seq_lens[member]
            assert tables[member][: prefix_len // 16] == tables[members[first]][: prefix_len // 16]
            rows.append((member, offsets[member] + part))
    expected = [(r, row) for r in range(len(seq_lens)) for row in range(offsets[r], offsets[r + 1])]
    assert sorted(rows) == expected
    assert offsets[-1] <= plan.num_rows
    for request, length in enumerate(seq_lens):
        assert (offsets[request] == offsets[request + 1]) == (length == 0)


def test_sizes_follow_from_the_number_of_requests_alone() -> None:
    def sizes(seq_lens: list[int], shared: dict[int, int]) -> list[object]:
        plan = plan_decode(seq_lens, make_tables(seq_lens, shared, 16), 16, CAPACITY, CPU)
        tensors = (plan.items, plan.shared_items, plan.members, plan.prefix_lens)
        return [*(t.shape for t in tensors), plan.part_offsets.shape, plan.num_rows]

    alone = sizes([0, 0, 0], {})
    assert sizes([10_000, 5, 0], {}) == alone
    assert sizes([4000, 4000, 4000], {0: 200, 1: 200, 2: 200}) == alone


def test_parts_are_even_and_fill_the_device() -> None:
    plan = plan_decode(
        [8000, 500, 500, 500], make_tables([8000, 500, 500, 500], {}, 16), 16, CAPACITY, CPU
    )
    items = [row for row in plan.items.tolist() if row[0] >= 0]
    parts = [sum(row[0] == request for row in items) for request in range(4)]
    longest = max(8000 / parts[0], 500 / parts[1])
    assert longest <= 1.35 * 9500 / 33, "one part would keep the launch waiting"


def test_a_common_prefix_is_planned_once() -> None:
    seq_lens = [1000, 700, 900, 800]
    tables = make_tables(seq_lens, {0: 40, 2: 40, 3: 30}, 16)
    plan = plan_decode(seq_lens, tables, 16, CAPACITY, CPU)
    assert plan.prefix_lens.tolist() == [480, 0, 480, 480]
    assert sorted(plan.members.tolist()[:3]) == [0, 2, 3]


def test_short_prefixes_and_the_newest_block_are_not_shared() -> None:
    short = make_tables([100, 100], {0: 1, 1: 1}, 16)
    assert plan_decode([100, 100], short, 16, CAPACITY, CPU).prefix_lens.tolist() == [0, 0]
    same = [[7, 8, 9], [7, 8, 9]]
    assert plan_decode([48, 48], same, 16, CAPACITY, CPU).prefix_lens.tolist() == [32, 32]
    assert plan_decode([33, 33], same, 16, CAPACITY, CPU).prefix_lens.tolist() == [32, 32]
    assert plan_decode([32, 32], same, 16, CAPACITY, CPU).prefix_lens.tolist() == [0, 0]


def test_planning_is_cheap_beside_a_step() -> None:
    seq_lens = [4096 - 7 * index for index in range(64)]
    tables = make_tables(seq_lens, dict.fromkeys(range(0, 64, 2), 200), 16)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        plan_decode(seq_lens, tables, 16, DecodeCapacity(66, 64, 16, 512), CPU)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 5e-3
