"""Where a stepped hand-off reads from and writes to; every wrong access is a problem.

A target block belongs to a transfer from ``World.open`` until the receiver has reported its end or
``cancel`` has returned. A write is right only if it brings what the owner of the block is to get
there. A source block is overwritten the moment that the sender reports the transfer's end, and must
not be read after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from handoff_pair import BLOCK_SIZE, FakeStore
from torch import Tensor
from turns import Turns

from antiphon.workers.handoff.sender import HandoffSender

NUM_TARGET_BLOCKS = 7
NUM_SOURCE_BLOCKS = 24


@dataclass(eq=False)
class Transfer:
    """One transfer as both ends have reported it."""

    transfer_id: str
    source_table: list[int]
    target_table: list[int]
    expected: Tensor  # [tokens of the whole table, bytes]
    start: int
    end: int
    sender: HandoffSender
    num_pushed: int
    error: Exception | None = None  # as the receiver reported it
    num_completed: int = 0
    num_done: int = 0
    is_cancelled: bool = False
    is_finished: bool = False

    @property
    def is_over(self) -> bool:
        return self.num_done > 0 and (self.num_completed > 0 or self.is_cancelled)


class SourceStore(FakeStore):
    """Blocks that hold something only while a transfer may read them."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(NUM_SOURCE_BLOCKS)
        self.free = list(range(NUM_SOURCE_BLOCKS))
        self.reading_for: int | None = None  # the first block of a transfer, while in gather
        self.stall_seconds = 0  # of the next gather; what it reads comes late
        self.problems: list[str] = []
        self._turns = turns
        self._generator = torch.Generator().manual_seed(7)

    def take(self, num_blocks: int) -> list[int]:
        table = [self.free.pop(0) for _ in range(num_blocks)]
        for block in table:
            rows = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            self.slots[rows].random_(1, 256, generator=self._generator)
        return table

    def give_back(self, table: list[int]) -> None:
        self.slots[self.indices(table, 0, len(table) * BLOCK_SIZE)] = 0
        self.free += table

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        used = {block_table[token // BLOCK_SIZE] for token in range(start, end)}
        self.reading_for = block_table[0]
        self._turns.sleep(self.stall_seconds)
        self.reading_for, self.stall_seconds = None, 0
        if used & set(self.free):
            self.problems.append(f"tokens [{start}, {end}) were read after their transfer's end")
        super().gather(block_table, start, end, out)


class TargetStore(FakeStore):
    """Blocks with an owner each, and no right to write for anybody else."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(NUM_TARGET_BLOCKS)
        self.owners: dict[int, Transfer] = {}
        self.writing_for: int | None = None  # the first block of a transfer, while in scatter
        self.stall_seconds = 0  # of the next token's write
        self.problems: list[str] = []
        self._turns = turns

    @property
    def free(self) -> list[int]:
        return [block for block in range(NUM_TARGET_BLOCKS) if block not in self.owners]

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        rows = segment.view(end - start, -1)
        for token in range(start, end):  # one at a time, and anybody may get in between
            self.writing_for = block_table[0]
            self._turns.sleep(self.stall_seconds)
            self.writing_for, self.stall_seconds = None, 0
            block, offset = block_table[token // BLOCK_SIZE], token % BLOCK_SIZE
            self._check(block, offset, rows[token - start])
            self.slots[block * BLOCK_SIZE + offset] = rows[token - start]

    def _check(self, block: int, offset: int, row: Tensor) -> None:
        owner = self.owners.get(block)
        if owner is None:
            self.problems.append(f"block {block} was written and belongs to nobody")
            return
        token = owner.target_table.index(block) * BLOCK_SIZE + offset
        if not owner.start <= token < owner.end or not owner.expected[token].equal(row):
            self.problems.append(f"token {token} of a transfer got bytes of something else")
