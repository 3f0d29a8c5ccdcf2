"""A cache on the CPU as rows of bytes: what ``gather_kv`` and ``scatter_kv`` do without converting.

A hand-off on one core is bound by what each byte costs, and a short one by the number of calls. So
views are made once for a cache, and whole blocks move as one row each (12 KB at SmolLM2's shape,
not 768 bytes). Where every K and V has the same width and they lie in one allocation, as
``KVCache`` makes them, all layers move in one call. numpy moves them: its ``take`` and indexed
assignment cost less per byte than torch's ``index_select`` and ``index_copy_`` (0.10 against 0.12
ns and 0.11 against 0.18 ns), and less per call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antiphon.kernels.paged_kv import PagedKV

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SideRows:
    """K and V of one or more layers that follow one another on the wire, as bytes.

    Attributes:
        slots: ``[num_sides, num_blocks * block_size, bytes per token]``.
        blocks: ``[num_sides, num_blocks, bytes per block]``, the same memory.
    """

    slots: _Bytes
    blocks: _Bytes

    @property
    def num_bytes_per_token(self) -> int:
        """Of all its sides."""
        num_sides, _, width = self.slots.shape
        return int(num_sides * width)


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens that move together.

    Attributes:
        start: First of them, counted in the segment.
        end: One past the last.
        slots: Where they are in the cache, if their slots follow one another.
        blocks: The whole blocks that they fill, otherwise.
        scattered: Their slots, if they fill no blocks either.
    """

    start: int
    end: int
    slots: slice | None = None
    blocks: npt.NDArray[np.int64] | None = None
    scattered: npt.NDArray[np.int64] | None = None


def make_side_rows(layers: Sequence[PagedKV]) -> tuple[SideRows, ...]:
    """View every K and V as bytes, in wire order; once for a cache."""
    sides = [side for layer in layers for side in (layer.keys, layer.values)]
    stacked = _stacked(sides)
    return tuple(
        _rows(each)
        for each in ([stacked] if stacked is not None else [side[None] for side in sides])
    )


def _stacked(sides: Sequence[Tensor]) -> Tensor | None:
    """All sides as one tensor without a copy, if they are evenly spaced in one allocation."""
    first = sides[0]
    size = first.numel()
    if any(
        side.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        or side.shape != first.shape
        or side.storage_offset() != first.storage_offset() + index * size
        for index, side in enumerate(sides)
    ):
        return None
    return first.as_strided((len(sides), *first.shape), (size, *first.stride()))


def _rows(sides: Tensor) -> SideRows:
    num_sides, num_blocks, block_size = sides.shape[:3]
    raw = sides.view(num_sides, num_blocks, -1).view(torch.uint8).numpy()
    return SideRows(raw.reshape(num_sides, num_blocks * block_size, -1), raw)


def plan_moves(slots: Tensor, block_size: int) -> list[Move]:
    """Cut slots into a rest of a block, whole blocks, and another rest.

    Args:
        slots: ``[num_tokens]`` int64, on the CPU.
        block_size: Tokens per block.
    """
    at = slots.numpy()
    count = len(at)
    if _follow(at):
        return [_run(at, 0, count)] if count else []
    head = min(-int(at[0]) % block_size, count)
    tail = count - (count - head) % block_size
    firsts = at[head:tail:block_size]
    whole = at[head:tail].reshape(-1, block_size) == firsts[:, None] + np.arange(block_size)
    is_regular = whole.all() and (firsts % block_size == 0).all()
    if not (is_regular and _follow(at[:head]) and _follow(at[tail:])):
        return [Move(0, count, scattered=at)]
    blocks = Move(head, tail, blocks=firsts // block_size)
    moves = [_run(at, 0, head), blocks, _run(at, tail, count)]
    return [move for move in moves if move.start < move.end]


def _follow(at: npt.NDArray[np.int64]) -> bool:
    return bool((at[1:] - at[:-1] == 1).all())


def _run(at: npt.NDArray[np.int64], start: int, end: int) -> Move:
    first = int(at[start]) if start < end else 0
    return Move(start, end, slots=slice(first, first + end - start))


def read_rows(rows: SideRows, moves: Sequence[Move], out: _Bytes) -> None:
    """Copy tokens to ``out``, ``[num_sides * num_tokens * bytes per token]``."""
    num_sides, _, width = rows.slots.shape
    wire = out.reshape(num_sides, -1, width)
    for move in moves:
        if move.slots is not None:
            wire[:, move.start : move.end] = rows.slots[:, move.slots]
            continue
        table, indices = _indexed(rows, move)
        if move.end - move.start == wire.shape[1]:
            # ``clip`` because the default mode copies through a buffer.
            target = out.reshape(-1, table.shape[2])
            table.reshape(-1, table.shape[2]).take(
                _of_all_sides(table, indices), axis=0, out=target, mode="clip"
            )
            continue
        for side in range(num_sides):
            target = wire[side, move.start : move.end].reshape(len(indices), -1)
            table[side].take(indices, axis=0, out=target, mode="clip")


def write_rows(rows: SideRows, moves: Sequence[Move], source: _Bytes) -> None:
    """Copy ``source`` to tokens; the inverse of ``read_rows``."""
    num_sides, _, width = rows.slots.shape
    wire = source.reshape(num_sides, -1, width)
    for move in moves:
        if move.slots is not None:
            rows.slots[:, move.slots] = wire[:, move.start : move.end]
            continue
        table, indices = _indexed(rows, move)
        if move.end - move.start == wire.shape[1]:
            flat = table.reshape(-1, table.shape[2])
            flat[_of_all_sides(table, indices)] = source.reshape(-1, table.shape[2])
            continue
        for side in range(num_sides):
            table[side, indices] = wire[side, move.start : move.end].reshape(len(indices), -1)


def _indexed(rows: SideRows, move: Move) -> tuple[_Bytes, npt.NDArray[np.int64]]:
    """Whole blocks where there are some, else slots."""
    if move.blocks is not None:
        return rows.blocks, move.blocks
    assert move.scattered is not None
    return rows.slots, move.scattered


def _of_all_sides(table: _Bytes, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    num_sides, num_rows = table.shape[:2]
    rows: npt.NDArray[np.int64] = np.arange(num_sides)[:, None] * num_rows + indices
    return rows.reshape(-1)
