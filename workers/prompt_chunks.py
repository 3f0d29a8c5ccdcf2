"""Shares the prompt tokens of a step out, and has what prompts begin with computed once.

Prompts with one prefix that come together are all admitted before any of it has KV. The oldest one
computes; whoever lacks the same block next gets nothing in that step, and finds the block in the
prefix cache before the next (``BlockTables.catch_up``). So a prompt waits only in a step in which
another one moves on for it. If that one is aborted or preempted, or the block is evicted at once,
the next step knows nothing of it, and the prompt computes the block itself.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from antiphon.block_hash import BlockHash
from antiphon.workers.batch import Chunk
from antiphon.workers.block_tables import BlockTables
from antiphon.workers.request import Request


@dataclass(frozen=True, slots=True)
class PromptBudget:
    """Prompt tokens that a step may have."""

    num_tokens: int
    max_rest: int = 0  # how many more the end of a prompt may add


def prompt_chunks(
    prompts: Iterable[Request], budget: PromptBudget, tables: BlockTables, now: float
) -> list[Chunk]:
    """Share a budget out, oldest first; with none left, the oldest crawls rather than starves."""
    chunks: list[Chunk] = []
    coming: set[BlockHash] = set()  # of blocks that older prompts complete in this step
    num_left = max(budget.num_tokens, 1)
    for request in prompts:
        if num_left <= 0:
            break
        if tables.next_hash(request) in coming:
            continue
        num_tokens = min(request.num_remaining_tokens, num_left)
        if request.num_remaining_tokens - num_tokens <= budget.max_rest:
            num_tokens = request.num_remaining_tokens
        samples = not request.is_prefill_only and num_tokens == request.num_remaining_tokens
        request.timeline.prefill_began_at = request.timeline.prefill_began_at or now
        chunks.append(Chunk(request, request.num_computed_tokens, num_tokens, samples))
        coming.update(tables.next_hashes(request, num_tokens))
        num_left -= num_tokens
    return chunks


def num_distinct_tokens(prompts: Iterable[Request], block_size: int) -> int:
    """Count the tokens to be computed for prompts; a block that several of them lack counts once.

    Only prompts that begin alike are looked into: this is asked for in every step. One that stands
    in the middle of a block shares nothing until a chunk of it ends where a block does.
    """
    total = 0
    alike: dict[BlockHash, list[Request]] = {}
    for request in prompts:
        total += request.num_remaining_tokens
        if request.block_hashes:
            alike.setdefault(request.block_hashes[0], []).append(request)
    num_shared = sum(_num_shared(g, block_size) for g in alike.values() if len(g) > 1)
    return total - num_shared * block_size


def _num_shared(prompts: Iterable[Request], block_size: int) -> int:
    """Blocks that a prompt lacks and one before it has or lacks, too.

    In a chain of hashes the shared ones come first, so a binary search finds how many there are.
    """
    known: set[BlockHash] = set()
    total = 0
    for request in prompts:
        first, begun = divmod(request.num_computed_tokens, block_size)
        hashes = request.block_hashes
        if not begun:
            start = min(first, len(hashes))
            found = bisect_left(hashes, True, lo=start, key=lambda h: h not in known)
            total += found - start
        known.update(hashes)
    return total
