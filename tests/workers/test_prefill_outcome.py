"""Every refusal and every error of an attempt has one name, which metrics count it under."""

import pytest

from antiphon.errors import (
    AntiphonError,
    HandoffError,
    LinkBrokenError,
    PrefillFailedError,
    SegmentRejectedError,
    WorkerBusyError,
)
from antiphon.messages import RefusalKind, Refused
from antiphon.workers.prefill_outcome import Outcome, explained, refusal

REFUSALS = {
    RefusalKind.BUSY: Outcome.BUSY,
    RefusalKind.DRAINING: Outcome.DRAINING,
    RefusalKind.MOVED: Outcome.DRAINING,
    RefusalKind.INVALID: Outcome.REFUSED,
    RefusalKind.FAILED: Outcome.FAILED,
    RefusalKind.LINK_BROKEN: Outcome.LOST,
}


@pytest.mark.parametrize("kind", RefusalKind)
def test_every_kind_of_refusal_has_an_outcome(kind: RefusalKind) -> None:
    error = refusal(Refused("r", kind, "why", 2.5))
    assert (error.outcome, str(error), error.retry_after_seconds) == (REFUSALS[kind], "why", 2.5)


@pytest.mark.parametrize(
    ("error", "is_late", "outcome"),
    [
        (WorkerBusyError("all links are in use"), False, Outcome.NO_LINK),
        (LinkBrokenError("the prefill worker is gone"), True, Outcome.LOST),
        (SegmentRejectedError("its checksum is wrong"), False, Outcome.REJECTED),
        (HandoffError("cancelled"), True, Outcome.TIMED_OUT),
        (HandoffError("cancelled"), False, Outcome.FAILED),
    ],
)
def test_every_error_has_an_outcome(error: AntiphonError, is_late: bool, outcome: Outcome) -> None:
    named = explained(error, is_late=is_late)
    assert (named.outcome, str(named)) == (outcome, str(error))


def test_what_is_named_already_stays() -> None:
    stalled = PrefillFailedError(Outcome.STALLED, "nothing came")
    assert explained(stalled, is_late=True) is stalled
