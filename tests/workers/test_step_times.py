import pytest

from antiphon.workers.step_times import StepTimes


def learned(target: float | None = 0.2) -> StepTimes:
    """Steps of 40 ms and 10 ms for each stream; with prompts 60 ms and 2 ms a token."""
    times = StepTimes(target, max_batch_tokens=128)
    now = 0.0
    for round_ in range(60):
        now += 0.2
        times.record(4, 60 + round_ % 40, 0.06 + 0.002 * (4 + 60 + round_ % 40), now)
        for num_streams in (1, 4, 8, 2):
            now += 0.1
            times.record(num_streams, 0, 0.04 + 0.01 * num_streams, now)
    for num_streams in (1, 4, 8, 2, 1, 4):
        now += 0.1
        times.record(num_streams, 0, 0.04 + 0.01 * num_streams, now)
    return times


def test_a_step_is_a_base_and_so_much_for_each_stream() -> None:
    times = learned()
    assert times.base_seconds == pytest.approx(0.04, rel=0.1)
    assert times.stream_seconds == pytest.approx(0.01, rel=0.1)
    assert times.decode_seconds(16) == pytest.approx(0.2, rel=0.05)


def test_nothing_is_known_at_first_and_one_step_gives_a_modest_slope() -> None:
    times = StepTimes(0.2)
    assert times.decode_seconds(8) == 0.0
    assert times.prompt_step(8) == (0, 0.0)
    times.record(2, 0, 0.06, 1.0)
    assert times.decode_seconds(2) == pytest.approx(0.06)
    assert 0.06 < times.decode_seconds(4) < 0.12


def test_equal_batches_keep_the_prior_slope_and_no_slope_is_negative() -> None:
    times = StepTimes()
    for step in range(300):
        times.record(8, 0, 0.1 + 0.02 * (step % 2), step * 0.1)
    assert times.decode_seconds(8) == pytest.approx(0.11, rel=0.05)
    assert times.stream_seconds > 0
    for step in range(300):
        times.record(1 + step % 8, 0, 0.2 - 0.01 * (step % 8), 40 + step * 0.1)
    assert times.stream_seconds == 0.0
    assert times.base_seconds > 0


@pytest.mark.parametrize("num_prompt_tokens", [0, 80])
def test_a_step_during_a_pause_of_the_machine_is_not_believed(num_prompt_tokens: int) -> None:
    times = learned(target=0.4)
    known, step = times.prompt_limit(4), times.decode_seconds(4)
    times.record(4, num_prompt_tokens, 20.0, 120.0)
    assert times.decode_seconds(4) == pytest.approx(step, rel=0.1)
    assert times.prompt_limit(4) == pytest.approx(known, rel=0.15)


def test_a_machine_that_became_slower_is_believed() -> None:
    times = learned()
    for step in range(100):
        times.record(4, 0, 0.4, 101 + 0.4 * step)
    assert times.decode_seconds(4) == pytest.approx(0.4, rel=0.1)


def test_a_small_first_piece_does_not_make_prompts_dear() -> None:
    times = StepTimes(0.5, max_batch_tokens=128)
    times.record(1, 0, 0.05, 0.1)
    for step in range(10):  # prompts of 129 tokens
        times.record(0, 128, 0.06 + 0.003 * 128, 1.0 + step)
        times.record(0, 1, 0.06, 1.5 + step)
    assert times.prompt_limit(4) == pytest.approx((0.45 - 0.06) / 0.003 - 4, rel=0.05)


def test_prompts_get_what_the_streams_leave_of_the_target() -> None:
    times = learned(target=0.3)
    # 0.9 x 300 ms less 60 ms leave 210 ms at 2 ms a token, some of them for the streams.
    assert times.prompt_limit(4) == pytest.approx(101, abs=3)
    assert times.prompt_limit(24) == pytest.approx(81, abs=3)
    tokens, seconds = times.prompt_step(4)
    assert tokens == times.prompt_limit(4)
    assert seconds == pytest.approx(0.27, rel=0.05)
    assert learned(target=0.5).prompt_step(8)[0] == 120  # the budget of a step binds first


def test_a_prompt_moves_on_however_many_streams_there_are() -> None:
    times = learned(target=0.1)
    assert times.decode_seconds(30) > 0.1
    assert times.prompt_limit(30) == times.prompt_limit(60) == 32


def test_nothing_is_limited_without_target_or_streams_or_knowledge() -> None:
    assert learned(target=None).prompt_limit(8) is None
    assert learned().prompt_limit(0) is None
    assert StepTimes(0.1).prompt_limit(4) is None
    tokens, seconds = learned(target=None).prompt_step(8)
    assert tokens == 120
    assert seconds == pytest.approx(0.06 + 0.002 * 128, rel=0.1)


def test_the_share_of_prompt_work_follows_the_last_seconds() -> None:
    times = StepTimes()
    times.record(1, 0, 0.1, 0.1)
    for step in range(300):  # half of every step is prompt
        times.record(1, 50, 0.2, 0.3 + 0.2 * step)
    assert times.prompt_share(60.1) == pytest.approx(0.5, abs=0.05)
    for step in range(100):
        times.record(1, 0, 0.1, 60.2 + 0.1 * step)
    assert times.prompt_share(70.2) < 0.1
    times.record(0, 100, 5.0, 80.0)
    assert times.prompt_share(80.0) > 0.6
    assert times.prompt_share(100.0) < 0.02  # idle since


def test_a_worker_that_never_runs_out_of_prompts_learns_its_decode_steps_too() -> None:
    times = StepTimes(0.2)
    times.record(0, 100, 0.26, 0.2)
    times.record(0, 50, 0.16, 0.4)
    for step in range(50):
        times.record(2, 30, 0.124, 0.6 + 0.124 * step)
    assert 0.03 < times.decode_seconds(2) < 0.1
    assert times.prompt_limit(2) > 0
