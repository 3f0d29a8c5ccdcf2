"""A layer's K or V as rows of tokens, wherever its blocks lie.

Slot ``s`` is token ``s % block_size`` of block ``s // block_size``. Where a block keeps K and V of
all layers together, the other layers lie between two blocks of one layer, so a slot is not the row
that it is where blocks follow one another.
"""

from torch import Tensor


def slot_rows(cache: Tensor) -> Tensor:
    """``[num_blocks, block_size, heads, dim] -> [rows, heads, dim]``, a view with ``rows_of``."""
    num_blocks, block_size, num_heads, head_dim = cache.shape
    num_rows = (num_blocks - 1) * _pitch(cache) + block_size
    return cache.as_strided((num_rows, num_heads, head_dim), cache.stride()[1:])


def rows_of(slots: Tensor, cache: Tensor) -> Tensor:
    """Where slots, of any integer dtype, are in ``slot_rows(cache)``."""
    block_size = cache.shape[1]
    gap = _pitch(cache) - block_size
    return slots + slots // block_size * gap if gap else slots


def _pitch(cache: Tensor) -> int:
    """Rows from one block to the next."""
    return cache.stride(0) // cache.stride(1)
