"""Work that this router has sent and that the workers' telemetry does not show yet.

Telemetry lags. Without this ledger, all prompts of a burst would go to the worker that looked best
in the last message. An entry is *unseen* until the worker reports at least ``lag_seconds`` after it
was sent; from then on the report speaks for it. It is *outstanding* until it is removed.

Time alone cannot tell: the first request of a burst wakes a worker, whose report comes a publishing
interval later and speaks of that one, while the others came during its step. So a stream stays
unseen as well while the worker counts fewer requests than this router has streams there. A prefill
worker is done with a prompt before this router knows, so there the time has to do.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SentItem:
    """What one decision asks of one worker."""

    sent_at: float
    num_prefill_tokens: int  # to be computed there
    num_blocks: int  # to be reserved there
    is_stream: bool = False  # to be generated there


class WorkerLedger:
    """One worker's part, with running totals of what is outstanding and what is unseen."""

    def __init__(self, lag_seconds: float) -> None:
        self._lag_seconds = lag_seconds
        self._outstanding: dict[int, bool] = {}  # whether it is a stream
        self._unseen: dict[int, SentItem] = {}  # oldest first
        # Plain numbers, because every decision reads those of every worker.
        self.num_outstanding = 0
        self.num_unseen = 0
        self.num_unseen_prefill_tokens = 0
        self.num_unseen_blocks = 0
        self.num_unseen_streams = 0
        self.num_streams = 0  # outstanding ones

    def add(self, decision_id: int, item: SentItem) -> None:
        """Enter a decision."""
        self._outstanding[decision_id] = item.is_stream
        self.num_streams += item.is_stream
        self._unseen[decision_id] = item
        self.num_outstanding = len(self._outstanding)
        self._count(item, 1)

    def settle(self, updated_at: float, num_requests: int) -> None:
        """Leave to a report what it can include.

        Args:
            updated_at: When it came.
            num_requests: That it counts on the worker, whoever sent them.
        """
        num_missing = self.num_streams - num_requests  # so many, at least, of the newest
        while self._unseen:
            decision_id, item = next(iter(self._unseen.items()))
            if item.sent_at + self._lag_seconds > updated_at:
                return
            if item.is_stream and self.num_unseen_streams <= num_missing:
                return
            self.see(decision_id)

    def see(self, decision_id: int) -> None:
        """Count a decision as reported; harmless if it is already."""
        item = self._unseen.pop(decision_id, None)
        if item is not None:
            self._count(item, -1)

    def remove(self, decision_id: int) -> None:
        """Forget a decision; harmless if it is unknown."""
        self.see(decision_id)
        self.num_streams -= self._outstanding.pop(decision_id, False)
        self.num_outstanding = len(self._outstanding)

    def _count(self, item: SentItem, sign: int) -> None:
        self.num_unseen += sign
        self.num_unseen_prefill_tokens += sign * item.num_prefill_tokens
        self.num_unseen_blocks += sign * item.num_blocks
        self.num_unseen_streams += sign * item.is_stream


class SentWork:
    """The ledgers of all workers, by incarnation.

    Args:
        lag_seconds: From sending a request to the earliest report that can include it, as workers
            publish what has changed after so long.
    """

    def __init__(self, lag_seconds: float = 0.05) -> None:
        self._lag_seconds = lag_seconds
        self._ledgers: dict[str, WorkerLedger] = {}

    def of(self, incarnation: str) -> WorkerLedger | None:
        """Return a worker's ledger, or ``None`` if nothing is outstanding there."""
        return self._ledgers.get(incarnation)

    def add(self, incarnation: str, decision_id: int, item: SentItem) -> None:
        """Enter what a decision asks of a worker."""
        ledger = self._ledgers.get(incarnation)
        if ledger is None:
            ledger = self._ledgers[incarnation] = WorkerLedger(self._lag_seconds)
        ledger.add(decision_id, item)

    def see(self, incarnation: str, decision_id: int) -> None:
        """Count what a decision asks of a worker as reported."""
        if ledger := self._ledgers.get(incarnation):
            ledger.see(decision_id)

    def remove(self, incarnation: str, decision_id: int) -> None:
        """Forget what a decision asked of a worker; harmless if it is unknown."""
        if ledger := self._ledgers.get(incarnation):
            ledger.remove(decision_id)
            if not ledger.num_outstanding:
                del self._ledgers[incarnation]
