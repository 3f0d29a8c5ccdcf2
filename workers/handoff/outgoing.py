"""A transfer on the sending side, and the messages that are made of it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from antiphon.workers.handoff.segment import Kind, SenderAccount
from antiphon.workers.handoff.transport import Pending


@dataclass(frozen=True, slots=True)
class Computed:
    """How a prompt's KV came about; told to the receiver with the transfer's end."""

    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    num_cached_tokens: int = 0


NOT_TOLD = Computed()


@dataclass(slots=True, eq=False)
class Outgoing:
    """A transfer that is being sent; guarded by the sender's lock."""

    transfer_id: str
    num_taken: int  # tokens before this one were sent, or are on their way
    num_pushed: int  # tokens before this one are computed
    num_cleared: int = 0  # tokens before this one go now: enough had come together
    block_table: tuple[int, ...] = ()
    mark: Any = None  # of the engine's stream at the last push
    finished_at: float | None = None  # ``time.monotonic``
    began_at: float | None = None  # the same, of the first segment
    computed: Computed = NOT_TOLD
    abort_reason: str | None = None
    is_ending: bool = False  # END or ABORT is on its way
    num_bytes: int = 0  # that the receiver took
    busy_seconds: float = 0.0

    def has_work(self, min_tokens: int) -> bool:
        """Whether there is something to say to the receiver.

        Args:
            min_tokens: As few are sent only once the prompt is done.
        """
        if self.is_ending:
            return False
        if self.abort_reason is not None or self.finished_at is not None:
            return True
        is_begun = self.num_taken < self.num_cleared
        return is_begun or self.num_pushed - self.num_taken >= min_tokens


@dataclass(frozen=True, slots=True)
class Message:
    """What to send next."""

    kind: Kind
    transfer: Outgoing
    span: tuple[int, int]
    block_table: tuple[int, ...]
    mark: Any
    abort_reason: str | None


@dataclass(frozen=True, slots=True)
class Flight:
    """A message on the wire."""

    message: Message
    num_payload_bytes: int
    began: float  # ``time.perf_counter``
    pending: Pending


@dataclass(frozen=True, slots=True)
class Cut:
    """Where transfers are cut into segments.

    Attributes:
        max_tokens: In one segment.
        min_tokens: See ``Outgoing.has_work``.
        block_size: A segment that is cut off ends with a block, since whole blocks move faster; but
            not where no block fits, or each block would end in a small segment of its own.
    """

    max_tokens: int
    min_tokens: int
    block_size: int

    def end(self, start: int, num_pushed: int) -> int:
        """Where a segment from ``start`` on ends."""
        end = start + self.max_tokens
        if end >= num_pushed:
            return num_pushed
        if self.max_tokens < self.block_size:
            return end
        return end - end % self.block_size


def account(transfer: Outgoing, now: float) -> SenderAccount:
    """What a transfer that ends ``now`` says of itself."""
    computed = transfer.computed
    return SenderAccount(
        age_microseconds=_microseconds(now - (transfer.finished_at or now)),
        queue_microseconds=_microseconds(computed.queue_seconds),
        compute_microseconds=_microseconds(computed.compute_seconds),
        send_microseconds=_microseconds(now - (transfer.began_at or now)),
        num_cached_tokens=computed.num_cached_tokens,
    )


def _microseconds(seconds: float) -> int:
    return round(1e6 * seconds)


def next_message(transfers: Iterable[Outgoing], cut: Cut) -> Message | None:
    """Take the next message from the oldest transfer that has one; None if there is none.

    Args:
        transfers: Oldest first.
        cut: Into segments.
    """
    for transfer in transfers:
        if transfer.has_work(cut.min_tokens):
            kind, span = _take(transfer, cut)
            mark, reason = transfer.mark, transfer.abort_reason
            return Message(kind, transfer, span, transfer.block_table, mark, reason)
    return None


def _take(transfer: Outgoing, cut: Cut) -> tuple[Kind, tuple[int, int]]:
    start = transfer.num_taken
    end = cut.end(start, transfer.num_pushed)
    if transfer.abort_reason is not None:
        transfer.is_ending = True
        return Kind.ABORT, (start, start)
    if start == end:
        transfer.is_ending = True
        return Kind.END, (0, end)
    if start >= transfer.num_cleared:
        transfer.num_cleared = transfer.num_pushed
    transfer.num_taken = end
    return Kind.DATA, (start, end)


class BusyClock:
    """Seconds that overlapping flights keep a link busy, each second counted once."""

    def __init__(self) -> None:
        self._counted_until = 0.0

    def landed(self, flight: Flight) -> float:
        """Seconds since the flight began that no earlier one was given."""
        now = time.perf_counter()
        seconds = now - max(flight.began, self._counted_until)
        self._counted_until = now
        return seconds
