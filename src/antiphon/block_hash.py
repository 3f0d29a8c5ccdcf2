"""Names blocks of tokens by a hash that covers the block and all tokens before it.

So equal hashes mean equal prefixes, and one dictionary serves as a prefix tree. Every process
computes them alike: the router matches prompts against the hashes that workers report.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
_HASH_BYTES = 16


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[BlockHash]:
    """Return the chained hash of each full block of ``token_ids``.

    Args:
        token_ids: Tokenised prompt; an incomplete last block has no hash.
        block_size: Tokens per block.
        salt: Separates chains that must not share blocks, such as those of different models.
    """
    packed = array("I", token_ids).tobytes()
    stride = block_size * array("I").itemsize
    parent = salt
    hashes = []
    for start in range(0, len(packed) - stride + 1, stride):
        block = packed[start : start + stride]
        parent = hashlib.blake2b(parent + block, digest_size=_HASH_BYTES).digest()
        hashes.append(BlockHash(parent))
    return hashes
