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


def outcome_of(kind: RefusalKind) -> str:
    error = refusal(Refused("r", kind, "why"))
    assert str(error) == "why"
    return error.outcome


def test_every_kind_of_refusal_has_an_outcome() -> None:
    outcomes = {outcome_of(kind) for kind in RefusalKind}
    assert outcomes < set(Outcome)
    assert Outcome.COMPLETE not in outcomes


def test_a_worker_that_stops_counts_as_draining_whenever_it_says_so() -> None:
    assert outcome_of(RefusalKind.DRAINING) == Outcome.DRAINING
    assert outcome_of(RefusalKind.MOVED) == Outcome.DRAINING
    assert outcome_of(RefusalKind.BUSY) == Outcome.BUSY


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
