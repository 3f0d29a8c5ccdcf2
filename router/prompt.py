"""A prompt as the router sees it: its length, and its block hashes for each block size in use.

Hashing is the dearest part of a decision and depends on the prompt alone, so the choices of one
prompt, and every retry with another ``exclude``, use the same object. A replay has a longer prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from antiphon.block_hash import BlockHash, hash_blocks


@dataclass(frozen=True, slots=True)
class HashedPrompt:
    """A tokenised prompt's length and block hashes."""

    num_tokens: int
    hashes: Mapping[int, Sequence[BlockHash]] = field(repr=False)  # by block size

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV must exist before the first decode step: all but the last."""
        return self.num_tokens - 1


def hash_prompt(token_ids: Sequence[int], block_sizes: Iterable[int]) -> HashedPrompt:
    """Hash a prompt once for every block size.

    Raises:
        ValueError: The prompt is empty; there is nothing to decode from.
    """
    if not token_ids:
        raise ValueError("the prompt has no tokens; at least one is needed to decode from")
    return HashedPrompt(
        len(token_ids), {size: hash_blocks(token_ids, size) for size in block_sizes}
    )
