"""What a first token waited for, part by part; the parts add up to the whole."""

import pytest

from antiphon.request_timing import FailedPrefill, RemotePrefill, RequestTiming
from antiphon.workers.timeline import Handoff, Timeline

REMOTE = RemotePrefill(
    "p0", queue=1.0, compute=4.0, send=2.0, num_cached_tokens=0, num_sent_tokens=9
)
FAILED = (FailedPrefill("p1", "stalled", 3.0),)
TRIED = Handoff(failed=FAILED)


def parts(timing: RequestTiming) -> tuple[float, ...]:
    return (
        timing.queue, timing.prefill_queue, timing.prefill,
        timing.transfer, timing.decode_queue, timing.first_step,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("timeline", "path", "computes_prompt", "expected"),
    [
        # Computed here in one step, or in two of which the first ended at 117.
        (Timeline(100, 110, 112), "local", True, (10, 2, 18, 0, 0, 0)),
        (Timeline(100, 110, 112, 117), "local", False, (10, 2, 5, 0, 3, 10)),
        # All was cached: nobody computed.
        (Timeline(100, 110), "local", False, (10, 0, 0, 0, 10, 10)),
        # A prefill worker computed for 4 s, after another had failed.
        (
            Timeline(100, 102, 0, 115, Handoff(REMOTE, 2.0, FAILED)), "remote", False,
            (2, 7, 4, 2, 5, 10),
        ),
        # Nobody delivered: computed here after 3 s of trying; or the last of it came before that.
        (Timeline(100, 102, 106, 0, TRIED), "fallback", True, (2, 4, 24, 0, 0, 0)),
        (Timeline(100, 102, 0, 106, TRIED), "fallback", False, (2, 4, 0, 0, 14, 10)),
    ],
)  # fmt: skip
def test_parts(
    timeline: Timeline, path: str, computes_prompt: bool, expected: tuple[float, ...]
) -> None:
    timing = timeline.timing(path, (120, 130), computes_prompt)
    assert parts(timing) == expected
    assert timing.total == 130 - 100
    assert timing.remote is timeline.handoff.remote
    assert timing.failed == timeline.handoff.failed


def test_a_preempted_prompt_is_computed_anew() -> None:
    timeline = Timeline(100, 102, 0, 115, Handoff(REMOTE, 2.0, FAILED))
    timeline.restart()
    timeline.prefill_began_at = 118
    timing = timeline.timing("local", (120, 130), computes_prompt=True)
    assert parts(timing) == (2, 16, 12, 0, 0, 0)
    assert (timing.remote, timing.failed) == (None, FAILED)


def test_a_cached_prompt_takes_no_computing() -> None:
    assert Timeline(100, 102, 104).computed(110) == (4, 6)
    assert Timeline(100, 102).computed(110) == (10, 0)
