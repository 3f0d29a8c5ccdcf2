"""What an ingress keeps of a request, and when it may go on: the account alone."""

import pytest

from antiphon.config import RouterConfig
from antiphon.deployment.backend import REST_OF_CONTEXT
from antiphon.deployment.replay import MAX_REFUSALS, Replay, replay_reason
from antiphon.deployment.shared_answer import SharedAnswer
from antiphon.errors import (
    AntiphonError,
    NoWorkerError,
    RequestError,
    WorkerBusyError,
    WorkerDrainingError,
    WorkerLostError,
    WorkerMovedError,
)
from antiphon.messages import RequestOutput, SamplingParams
from antiphon.request_timing import RequestTiming

SAMPLING = SamplingParams(max_tokens=5, temperature=0.7, seed=11, stop_token_ids=(99,))


def replay(**config: float) -> Replay:
    return Replay([1, 2, 3], SAMPLING, RouterConfig.model_validate(config))


def output(*token_ids: int, cached: int = 0, timing: bool = False) -> RequestOutput:
    spent = RequestTiming("remote", prefill=1.0, first_step=0.1) if timing else None
    return RequestOutput("r", list(token_ids), None, cached, spent)


def test_a_replay_continues_with_what_is_left() -> None:
    request = replay()
    request.take(output(7, 8))
    request.failed("w", WorkerLostError("gone"), now=0.0)
    assert request.prompt_token_ids == [1, 2, 3, 7, 8]
    assert request.sampling == SamplingParams(3, 0.7, seed=11, stop_token_ids=(99,))
    assert request.original_prompt == [1, 2, 3]


def test_the_client_hears_of_the_first_worker_only() -> None:
    request = replay()
    first = request.take(output(7, cached=2, timing=True))
    request.failed("w", WorkerLostError("gone"), now=0.0)
    second = request.take(output(8, cached=4, timing=True))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (2, 2)
    assert first.timing is not None
    assert second.timing is None


def test_what_was_finished_is_not_sent_again() -> None:
    request = replay()
    assert request.finish_reason is None
    request.take(output(7, 8, 9))
    assert request.finish_reason is None
    request.take(output(10, 99))
    assert request.finish_reason == "stop"
    request = replay()
    request.take(output(5, 6, 7, 8, 9))
    assert request.finish_reason == "length"


def test_an_answer_without_a_limit_fills_the_context_of_whoever_begins_it() -> None:
    request = Replay([1, 2, 3], SamplingParams(REST_OF_CONTEXT), RouterConfig())
    for context, max_tokens in ((8, 5), (6, 3), (2, 1), (7, 4)):
        request.fit(context)
        assert request.sampling.max_tokens == max_tokens
    request.take(output(7))
    request.fit(6)
    assert request.sampling.max_tokens == 3, "what was begun goes on as it was begun"
    limited = replay()
    limited.fit(6)
    assert limited.sampling == SAMPLING, "the client's own limit is for a worker to refuse"


@pytest.mark.parametrize("has_begun", [False, True])
def test_replays_are_bounded(has_begun: bool) -> None:
    request = replay(max_replays=2)
    if has_begun:
        request.take(output(7))
    request.failed("a", WorkerLostError("gone"), now=0.0)
    request.failed("b", WorkerLostError("gone"), now=0.5)
    assert request.excluded(0.9) == {"a", "b"}
    assert request.excluded(1.0) == ({"b"} if has_begun else {"a", "b"})
    with pytest.raises(WorkerLostError, match="the third"):
        request.failed("c", WorkerLostError("the third"), now=0.0)


@pytest.mark.parametrize("has_begun", [False, True])
def test_workers_that_stop_and_give_it_back_use_up_no_replay(has_begun: bool) -> None:
    request = replay(max_replays=0)
    if has_begun:
        request.take(output(7))
    for index in range(10):
        request.failed(f"w{index}", WorkerMovedError("stops"), now=0.0)
    assert len(request.excluded(1e9)) == 10, "each is asked once"
    assert request.settle() == ["moved"] * 10
    with pytest.raises(WorkerLostError, match="gone"):
        request.failed("lost", WorkerLostError("gone"), now=0.0)


def test_busy_workers_are_three_until_the_stream_has_begun_and_then_may_be_asked_again() -> None:
    busy = WorkerBusyError("full")
    busy.retry_after_seconds = 2.0
    request = replay()
    for index in range(MAX_REFUSALS - 1):
        request.failed(f"w{index}", busy, now=0.0)
    with pytest.raises(WorkerBusyError):
        request.failed("last", busy, now=0.0)
    assert request.excluded(1e9) == {"w0", "w1", "last"}

    request = replay()
    request.failed("w", busy, now=0.0)
    assert request.excluded(1e9) == {"w"}
    request.take(output(7))
    assert request.excluded(1e9) == set(), "it may be the only one when the stream loses its own"
    for _ in range(3 * MAX_REFUSALS):
        request.failed("w", busy, now=10.0)
    assert request.excluded(11.9) == {"w"}
    assert request.excluded(12.0) == set()


def test_workers_that_take_long_to_say_busy_do_not_keep_a_stream_for_ever() -> None:
    busy = WorkerBusyError("no headroom")  # leaves it alone for 1 s, and takes longer to say so
    request = replay(replay_wait_seconds=5)
    request.take(output(7))
    request.failed("lost", WorkerLostError("gone"), now=100.0)
    for worker, now in (("a", 101.5), ("b", 103.0), ("a", 104.5)):
        assert worker not in request.excluded(now)
        request.failed(worker, busy, now)
    with pytest.raises(WorkerBusyError):
        request.failed("b", busy, now=106.0)


def test_a_stream_that_may_not_wait_asks_three_workers_after_each_token_all_the_same() -> None:
    busy = WorkerBusyError("full")
    request = replay(replay_wait_seconds=0)
    for _ in range(2):
        request.take(output(7))
        request.failed("lost", WorkerLostError("gone"), now=100.0)
        for index in range(MAX_REFUSALS - 1):
            request.failed(f"w{index}", busy, now=100.1)
    with pytest.raises(WorkerBusyError):
        request.failed("last", busy, now=100.1)


def test_draining_workers_count_as_nothing() -> None:
    request = replay(max_replays=0)
    for index in range(10):
        request.failed(f"w{index}", WorkerDrainingError("stops"), now=0.0)
    assert len(request.excluded(1e9)) == 10
    assert request.num_replays == 0


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (WorkerBusyError("full"), WorkerBusyError),
        (WorkerLostError("gone"), NoWorkerError),
        (WorkerMovedError("stops"), NoWorkerError),
        (None, NoWorkerError),
    ],
)
def test_a_request_without_tokens_does_not_wait_and_is_told_to_come_again(
    last: AntiphonError | None, told: type[AntiphonError]
) -> None:
    request = replay()
    if last is not None:
        request.failed("w", last, now=0.0)
    with pytest.raises(told):
        request.wait_or_raise(NoWorkerError("nobody"), now=0.0)


def test_a_stream_waits_for_a_bounded_time_and_anew_after_each_token() -> None:
    request = replay(replay_wait_seconds=5)
    request.take(output(7))
    request.failed("a", WorkerLostError("gone"), now=100.0)
    request.wait_or_raise(NoWorkerError("nobody"), now=104.9)
    request.failed("b", WorkerDrainingError("stops"), now=104.9)  # the pause goes on
    with pytest.raises(WorkerDrainingError):
        request.wait_or_raise(NoWorkerError("nobody"), now=105.0)
    request.take(output(8))
    request.failed("c", WorkerLostError("gone"), now=200.0)
    request.wait_or_raise(NoWorkerError("nobody"), now=204.0)


def choice_of_a_begun_answer() -> Replay:
    answer, config = SharedAnswer(), RouterConfig(replay_wait_seconds=5)
    sibling, request = (Replay([1, 2, 3], SAMPLING, config, answer) for _ in range(2))
    sibling.take(output(7))
    return request


def test_a_choice_without_tokens_waits_once_its_answer_has_begun() -> None:
    request = choice_of_a_begun_answer()
    request.wait_or_raise(NoWorkerError("nobody"), now=90.0)  # it has its turn, and was never sent
    request.failed("a", WorkerLostError("gone"), now=100.0)  # after 10 s in a queue
    assert request.excluded(101.0) == set()
    request.wait_or_raise(NoWorkerError("nobody"), now=104.9)
    with pytest.raises(NoWorkerError):
        request.wait_or_raise(NoWorkerError("nobody"), now=105.0)
    assert request.prompt_token_ids == [1, 2, 3]


def test_busy_workers_end_a_choice_without_tokens_when_its_answer_has_waited() -> None:
    request, busy = choice_of_a_begun_answer(), WorkerBusyError("full")
    for now in range(100, 105):
        request.failed("a", busy, now)
        assert request.excluded(now + 1.0) == set()
    with pytest.raises(WorkerBusyError):
        request.failed("a", busy, now=105.0)


def test_a_bad_request_is_the_clients_at_first_and_that_workers_later() -> None:
    error = RequestError("exceeds this worker's context")
    with pytest.raises(RequestError):
        replay().failed("w", error, now=0.0)
    request = replay()
    request.failed("a", WorkerLostError("gone"), now=0.0)
    request.failed("b", error, now=0.0)
    assert request.excluded(0.0) == {"a", "b"}
    with pytest.raises(NoWorkerError):
        request.wait_or_raise(NoWorkerError("nobody else"), now=0.0)


def test_reasons_are_few() -> None:
    errors = [WorkerLostError(""), WorkerMovedError(""), WorkerBusyError(""), NoWorkerError("")]
    named = [replay_reason(error) for error in (*errors, WorkerDrainingError(""))]
    assert named == ["lost", "moved", "busy", "busy", "draining"]
