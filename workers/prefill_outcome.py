"""How asking one prefill worker ended, whether it said so itself or an error tells."""

from enum import StrEnum

from antiphon.errors import (
    AntiphonError,
    CapacityError,
    LinkBrokenError,
    PrefillFailedError,
    SegmentRejectedError,
)
from antiphon.messages import RefusalKind, Refused


class Outcome(StrEnum):
    """How an attempt ended; a metric's label."""

    COMPLETE = "complete"
    BUSY = "busy"
    DRAINING = "draining"  # it stops, and took nothing or gave the prompt back
    REFUSED = "refused"  # it cannot take such a prompt
    FAILED = "failed"  # it could not finish, and said so
    UNREACHABLE = "unreachable"
    LOST = "lost"  # its session or its link broke
    REJECTED = "rejected"  # it sent a segment that failed its checks
    STALLED = "stalled"
    TIMED_OUT = "timed_out"
    NO_LINK = "no_link"  # this worker's own bound on links


_REFUSALS = {
    RefusalKind.BUSY: Outcome.BUSY,
    RefusalKind.DRAINING: Outcome.DRAINING,
    RefusalKind.MOVED: Outcome.DRAINING,
    RefusalKind.INVALID: Outcome.REFUSED,
    RefusalKind.FAILED: Outcome.FAILED,
    RefusalKind.LINK_BROKEN: Outcome.LOST,
}


def refusal(message: Refused) -> PrefillFailedError:
    """What a prefill worker that refuses, or gives a prompt back, means."""
    return PrefillFailedError(_REFUSALS[message.kind], message.reason)


def explained(error: AntiphonError, *, is_late: bool) -> PrefillFailedError:
    """Name the way in which an attempt failed.

    Args:
        error: That ended it.
        is_late: Whether no time was left by then.
    """
    if isinstance(error, PrefillFailedError):
        return error
    if isinstance(error, CapacityError):
        outcome = Outcome.NO_LINK
    elif isinstance(error, LinkBrokenError):
        outcome = Outcome.LOST
    elif isinstance(error, SegmentRejectedError):
        outcome = Outcome.REJECTED
    else:
        outcome = Outcome.TIMED_OUT if is_late else Outcome.FAILED
    return PrefillFailedError(outcome, str(error))
