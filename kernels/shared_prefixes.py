"""Finds decode requests whose block tables begin with the same blocks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Requests that begin with the same blocks.

    Attributes:
        members: Their indices in the batch, two or more, rising.
        num_tokens: Length of what they share; whole blocks, shorter than any member's context.
    """

    members: tuple[int, ...]
    num_tokens: int


def find_shared_prefixes(
    seq_lens: Sequence[int], tables: Sequence[Sequence[int]], block_size: int, min_tokens: int
) -> list[SharedPrefix]:
    """Group requests by common prefixes of at least ``min_tokens`` tokens.

    The newest token's block is never shared: it is being written. A request is in one group only.
    """
    min_blocks = max(1, -(-min_tokens // block_size))
    candidates: dict[int, list[int]] = {}
    for request, end in enumerate(seq_lens):
        if (end - 1) // block_size >= min_blocks:
            candidates.setdefault(tables[request][min_blocks - 1], []).append(request)
    groups = []
    for members in candidates.values():
        while len(members) > 1:
            leader = members[0]
            lengths = {m: _common_blocks(tables[leader], tables[m]) for m in members[1:]}
            alike = [m for m in members[1:] if lengths[m] >= min_blocks]
            if alike:
                num_blocks = min(
                    *(lengths[m] for m in alike),
                    *((seq_lens[m] - 1) // block_size for m in (leader, *alike)),
                )
                groups.append(SharedPrefix((leader, *alike), num_blocks * block_size))
            members = [m for m in members[1:] if m not in alike]
    return groups


def _common_blocks(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
