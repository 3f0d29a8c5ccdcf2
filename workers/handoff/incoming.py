"""One transfer on the receiving side, with the fence around its blocks."""

import threading
from typing import TYPE_CHECKING

from torch import Tensor

from antiphon.errors import SegmentRejectedError
from antiphon.workers.handoff.segment import Header, SenderAccount

if TYPE_CHECKING:
    from antiphon.workers.handoff.endpoint import SegmentTarget


class Incoming:
    """Live until fenced; every write to its blocks happens under its lock while it is live.

    Args:
        transfer_id: 32 hex digits.
        link_id: Of the only link that may bring its segments.
        block_table: Of the request, from its first token.
        span: First token to receive, and one past the last.
        began: ``time.monotonic()`` at ``expect``.
    """

    def __init__(
        self,
        transfer_id: str,
        link_id: str,
        block_table: tuple[int, ...],
        span: tuple[int, int],
        began: float,
    ) -> None:
        self.transfer_id = transfer_id
        self.link_id = link_id
        self.began = began
        self.account = SenderAccount()  # of a transfer that is complete
        self._block_table = block_table
        self._start, self._end = span
        self._next = self._start  # tokens before this one have landed
        self._lock = threading.Lock()
        self._is_live = True

    @property
    def num_received(self) -> int:
        """Tokens that have landed, without a gap, from the first."""
        return self._next - self._start

    @property
    def progress(self) -> str:
        """For messages."""
        return f"{self.num_received} of {self._end - self._start} tokens arrived"

    def fence(self) -> bool:
        """End the writing; returns whether it was still allowed."""
        with self._lock:
            was_live, self._is_live = self._is_live, False
            return was_live

    def take(self, header: Header, payload: Tensor, target: "SegmentTarget") -> str | None:
        """Check a segment and write it to the blocks.

        Returns:
            Why a harmless segment was discarded; None if it was written.

        Raises:
            SegmentRejectedError: The transfer can't be completed any more; nothing was written.
        """
        # Without the lock, for which ``fence`` may wait on the event loop. The payload stays as it
        # is: its buffer is the calling thread's.
        checksum = target.checksum(payload)
        with self._lock:
            if not self._is_live:
                return "unknown_transfer"
            if header.end <= self._next and header.start >= self._start:
                return "duplicate"
            self._check(header, checksum, target.num_bytes_per_token)
            target.scatter(self._block_table, header.start, header.end, payload)
            self._next = header.end
            return None

    def check_end(self, header: Header) -> None:
        """Check that nothing is missing when the sender says that it is done.

        Raises:
            SegmentRejectedError: Tokens are missing.
        """
        if self._next != self._end or header.end != self._end:
            raise SegmentRejectedError(
                f"range: the sender is done at token {header.end}, but {self.progress}"
            )

    def _check(self, header: Header, checksum: int, bytes_per_token: int) -> None:
        span = f"[{header.start}, {header.end})"
        if header.start != self._next or header.end > self._end:
            raise SegmentRejectedError(
                f"range: segment {span} does not continue at token {self._next} of "
                f"[{self._start}, {self._end})"
            )
        expected_bytes = (header.end - header.start) * bytes_per_token
        if header.num_payload_bytes != expected_bytes:
            raise SegmentRejectedError(
                f"size: segment {span} has {header.num_payload_bytes} bytes, not {expected_bytes}"
            )
        if checksum != header.payload_checksum:
            raise SegmentRejectedError(f"checksum: segment {span} is corrupt")
