"""Workers that Serve has just listed, and that no session is open with yet.

    listed ──session, first report──▶ usable            some 20 ms, for which requests may wait
       └──────── 5 s ────────▶ nobody waits for it any more, but it is still tried

In an update Serve stops the last worker of before, then drops it in the message that lists its
successor. Without this, who asks in between is refused though a worker runs.
"""

from collections.abc import Callable

from antiphon.messages import Role, WorkerCard

ARRIVAL_SECONDS = 5.0  # as long as a session may take to open


class Arrivals:
    """The times at which workers that generate were listed. On one event loop.

    Args:
        is_usable: Whether the router can choose a worker, by incarnation.
    """

    def __init__(self, is_usable: Callable[[str], bool]) -> None:
        self._is_usable = is_usable
        self._until: dict[str, float] = {}  # by incarnation

    def listed(self, card: WorkerCard, now: float) -> None:
        """Note a worker that Serve lists; the first time counts."""
        if card.role is not Role.PREFILL:
            self._until.setdefault(card.incarnation, now + ARRIVAL_SECONDS)

    def unlisted(self, incarnation: str) -> None:
        """Forget a worker; an unknown one is ignored."""
        self._until.pop(incarnation, None)

    def are_expected(self, now: float) -> bool:
        """Whether a worker may be usable any moment."""
        return any(
            now < until and not self._is_usable(incarnation)
            for incarnation, until in self._until.items()
        )
