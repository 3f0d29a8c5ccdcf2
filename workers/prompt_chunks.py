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

    In a chain of hashes the shared ones come first, so a binary search finds how many there are. A
    prompt that has waited so far has no hashes yet, and counts in full.
    """
    coming: set[BlockHash] = set()
    total = 0
    for request in prompts:
        first, begun = divmod(request.num_computed_tokens, block_size)
        hashes = request.block_hashes[first:]
        num_shared = 0
        if not begun and hashes and hashes[0] in coming:
            num_shared = bisect_left(hashes, True, key=lambda h: h not in coming)
        coming.update(hashes[num_shared:])
        total += request.num_remaining_tokens - num_shared * block_size
    return total
