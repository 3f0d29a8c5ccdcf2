"""Errors cross processes as they are: their words, and the fields that say what to do."""

import pickle

import pytest

from antiphon.errors import (
    AntiphonError,
    InvalidParameterError,
    LayoutMismatchError,
    PrefillFailedError,
    PromptTooLongError,
    UnknownModelError,
    WorkerBusyError,
)

BUSY = WorkerBusyError("12 requests wait")
BUSY.retry_after_seconds = 7.0


@pytest.mark.parametrize(
    "error",
    [
        InvalidParameterError("top_p", "must be above 0"),
        PromptTooLongError(9, 8, "messages"),
        UnknownModelError("a", "b"),
        LayoutMismatchError("dtype", "wire dtype is float32 here"),
        PrefillFailedError("stalled", "nothing came for 5.0 s"),
        BUSY,
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_sent(error: AntiphonError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
