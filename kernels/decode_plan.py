"""How the contexts of a decode step are divided over programs.

A step's time is that of its busiest multiprocessor, so contexts are cut into parts of nearly equal
length: the shortest for which all parts still run at once. Requests whose block tables begin with
the same blocks form a group, and that prefix is attended once for all of them.

Every tensor's size follows from the number of requests and the capacity alone; what is not needed
is padded with items that do nothing. So a captured graph can be fed a new plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from antiphon.kernels.attention_batch import DecodePlan
from antiphon.kernels.shared_prefixes import SharedPrefix, find_shared_prefixes


@dataclass(frozen=True, slots=True)
class DecodeCapacity:
    """What a device runs at once.

    Attributes:
        num_items: Work items: resident programs divided by KV heads.
        block_n: Keys of a tile; parts are whole tiles.
        members_per_item: Requests that one item of a shared prefix serves.
        shared_prefix_min_tokens: Shorter common prefixes are left to each request.
    """

    num_items: int
    block_n: int
    members_per_item: int
    shared_prefix_min_tokens: int


def plan_decode(
    seq_lens: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    capacity: DecodeCapacity,
    device: torch.device,
) -> DecodePlan:
    """Plan a decode step.

    Args:
        seq_lens: Tokens in each context, the new one included; 0 for padding.
        tables: Block ids of each request.
        block_size: Tokens per block.
        capacity: What the device runs at once.
        device: Where the plan is read.
    """
    num_requests = len(seq_lens)
    groups = find_shared_prefixes(seq_lens, tables, block_size, capacity.shared_prefix_min_tokens)
    prefix_lens = [0] * num_requests
    for group in groups:
        for member in group.members:
            prefix_lens[member] = group.num_tokens
    own_lens = [end - prefix for end, prefix in zip(seq_lens, prefix_lens, strict=True)]

    # One item for each request and one for each of its group's tiles must always fit.
    max_items = max(capacity.num_items, 2 * num_requests)
    num_rows = 3 * max_items
    part_len = _part_len(own_lens, groups, capacity, max_items, num_rows)
    shared = _divide_shared(groups, part_len, capacity.members_per_item, num_requests)
    items, offsets = _divide_own(own_lens, part_len, shared.num_parts)
    # Longest first does not matter among equals; padding goes last.
    items += [(-1, 0, 1, 0)] * (max_items - len(items))
    shared.items += [(0, 0, 0, 1, 0)] * (max_items - len(shared.items))
    shared.members += [0] * (num_requests - len(shared.members))

    def int32(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return DecodePlan(
        items=int32(items),
        shared_items=int32(shared.items),
        members=int32(shared.members),
        prefix_lens=int32(prefix_lens),
        part_offsets=int32(offsets),
        num_rows=num_rows,
        members_per_item=capacity.members_per_item,
    )


@dataclass(slots=True)
class _SharedWork:
    items: list[tuple[int, int, int, int, int]]  # first and last member, part, parts, tokens
    members: list[int]  # requests, tile by tile
    num_parts: list[int]  # of each request's shared prefix


def _divide_shared(
    groups: Sequence[SharedPrefix], part_len: int, members_per_item: int, num_requests: int
) -> _SharedWork:
    """One item for each part of a prefix and each tile of requests that share it."""
    work = _SharedWork([], [], [0] * num_requests)
    for group in groups:
        num_parts = -(-group.num_tokens // part_len)
        for first in range(0, len(group.members), members_per_item):
            some = group.members[first : first + members_per_item]
            bounds = (len(work.members), len(work.members) + len(some))
            work.members += some
            work.items += [(*bounds, p, num_parts, group.num_tokens) for p in range(num_parts)]
        for member in group.members:
            work.num_parts[member] = num_parts
    return work


def _divide_own(
    own_lens: Sequence[int], part_len: int, shared_parts: Sequence[int]
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """One item for each part of what a request has alone, and where the rows of each begin."""
    own_parts = [-(-length // part_len) for length in own_lens]
    sums = (shared + own for shared, own in zip(shared_parts, own_parts, strict=True))
    offsets = list(accumulate(sums, initial=0))
    items = [
        (request, part, num_parts, offsets[request] + shared_parts[request] + part)
        for request, num_parts in enumerate(own_parts)
        for part in range(num_parts)
    ]
    return items, offsets


def _part_len(
    own_lens: Sequence[int],
    groups: Sequence[SharedPrefix],
    capacity: DecodeCapacity,
    max_items: int,
    num_rows: int,
) -> int:
    """The shortest part, in whole tiles, for which resident items and workspace rows suffice."""
    tiled = [
        (group.num_tokens, -(-len(group.members) // capacity.members_per_item), len(group.members))
        for group in groups
    ]

    # Within what runs at once; if one item for each already is more, as fine as there is room, so
    # that the last wave is short.
    least = sum(length > 0 for length in own_lens) + sum(tiles for _, tiles, _ in tiled)
    if least <= capacity.num_items:
        max_items = capacity.num_items

    def fits(part_len: int) -> bool:
        num_own = sum(-(-length // part_len) for length in own_lens)
        shared = [(-(-length // part_len), tiles, count) for length, tiles, count in tiled]
        num_shared = sum(parts * tiles for parts, tiles, _ in shared)
        rows = num_own + sum(parts * count for parts, _, count in shared)
        return num_own + num_shared <= max_items and rows <= num_rows

    longest = max([*own_lens, *(group.num_tokens for group in groups), 1])
    low, high = 1, -(-longest // capacity.block_n)
    while low < high:  # `fits` is monotonic in the length
        middle = (low + high) // 2
        if fits(middle * capacity.block_n):
            high = middle
        else:
            low = middle + 1
    return low * capacity.block_n
