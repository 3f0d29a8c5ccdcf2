"""What both ends of a hand-off have in common: who they are and where their KV is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from antiphon.workers.handoff.transport import Transport
from antiphon.workers.handoff.wire import WireFormat


class SegmentTarget(Protocol):
    """Where segments are checked and written to; done on return."""

    num_bytes_per_token: int

    def checksum(self, payload: Tensor) -> int:
        """Of a segment; see ``segment.checksum``."""

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a segment, uint8 in wire order, to tokens ``[start, end)``."""


class KVStore(Protocol):
    """The KV cache, as the hand-off sees it. On a GPU copies are only queued on return."""

    num_bytes_per_token: int
    device: torch.device
    block_size: int

    def gather(self, block_table: Sequence[int], start: int, end: int, out: Tensor) -> None:
        """Copy KV of tokens ``[start, end)`` to ``out``, uint8 in wire order, on ``device``."""

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a segment, uint8 in wire order, to tokens ``[start, end)``."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One worker's end of its links.

    Args:
        transport: Closed by the sender and the receiver that share it, whichever ends first.
        store: Its ``gather`` and ``scatter`` are called from the links' threads.
        incarnation: Fresh at every start of the worker.
        wire: Must equal that of the other end.
        name: Replica id, for people.
    """

    transport: Transport
    store: KVStore
    incarnation: str
    wire: WireFormat
    name: str = ""
