"""Every fault at every step of a hand-off; the table of them is in ``fault_cells``."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from crew import Setting
from fault_cells import Cell, Kind, Step, all_cells, diagonal
from fault_scene import MAX_TOKENS, OTHER_PROMPT, PROMPT, Answer, Scene
from tiny_models import oracle, tiny_model

from antiphon.errors import NoWorkerError

ALONE = Setting(has_spares=False)
OVER_GLOO = Setting(over="gloo")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    return [oracle(model, prompt, MAX_TOKENS) for prompt in (PROMPT, OTHER_PROMPT)]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("cell", all_cells(), ids=str)
def test_every_fault_is_survived_counted_and_leaves_nothing(
    cell: Cell, model: Any, expected: list[list[int]]
) -> None:
    async def scenario() -> None:
        scene = Scene(cell, model)
        answers = await scene.play()
        assert [(each.error, each.tokens) for each in answers] == [(None, e) for e in expected]
        _check_attempts(scene, answers)
        _check_counters(scene, answers[0].path)
        await scene.check_and_close()

    run(scenario())


@pytest.mark.parametrize("cell", diagonal(0), ids=str)
def test_over_gloo_it_is_no_different(cell: Cell, model: Any, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        scene = Scene(cell, model, OVER_GLOO)
        answers = await scene.play()
        assert [(each.error, each.tokens) for each in answers] == [(None, e) for e in expected]
        _check_attempts(scene, answers)
        await scene.check_and_close()

    run(scenario())


@pytest.mark.parametrize("cell", diagonal(3), ids=str)
def test_without_another_worker_the_answer_is_right_or_an_error(
    cell: Cell, model: Any, expected: list[list[int]]
) -> None:
    async def scenario() -> None:
        scene = Scene(cell, model, ALONE)
        answers = await scene.play()
        if cell.outcome == "moved":  # and there is nowhere to move to
            _check_errors(answers, expected)
        else:
            assert [(each.error, each.tokens) for each in answers] == [(None, e) for e in expected]
            _check_attempts(scene, answers)
            # At the end all may have arrived before the fault.
            falls_back = cell.outcome == "again" and cell.step is not Step.END
            assert answers[0].path == "fallback" or not falls_back
        await scene.check_and_close()

    run(scenario())


def _check_errors(answers: tuple[Answer, Answer], expected: list[list[int]]) -> None:
    for answer, tokens in zip(answers, expected, strict=True):
        assert isinstance(answer.error, NoWorkerError)
        assert len(answer.tokens) < MAX_TOKENS
        assert answer.tokens == tokens[: len(answer.tokens)]


def _check_attempts(scene: Scene, answers: tuple[Answer, Answer]) -> None:
    """Each attempt at a prefill worker, and each fallback, is counted as what it was."""
    cell, failures = scene.cell, scene.attempts
    num_complete = failures.pop("complete", 0)
    assert set(failures) <= cell.failures
    assert bool(failures) == (cell.outcome == "again")
    if cell.times_out:  # on a busy machine others may be too slow as well
        assert answers[0].path == "remote" or not scene.crew.spares or failures["stalled"] > 1
    else:
        assert failures.total() == (cell.outcome == "again")
    if cell.outcome == "moved":
        return  # what the lost worker counted is lost with it
    paths = [answer.path for answer in answers]
    assert scene.fallbacks.total() == paths.count("fallback")
    assert set(scene.fallbacks) <= {*failures, "shunned"}
    # A transfer whose very end fails has brought everything all the same.
    slack = cell.outcome == "again" and (cell.times_out or cell.step is Step.END)
    assert paths.count("remote") + scene.num_warm_up - num_complete in ((0, 1) if slack else (0,))


def _check_counters(scene: Scene, path: str) -> None:
    cell, (spare, _) = scene.cell, scene.crew.spares
    at_end = cell.step is Step.END
    counters = scene.crew.decode.generate.receiver.counters()
    assert (scene.num_replays > 0) == (cell.outcome == "moved")
    if not cell.times_out:
        assert (scene.fallbacks, path) == ({}, "remote")
        # At the end all may have arrived before the fault.
        assert cell.outcome != "again" or spare.engine.stats.num_prompt_tokens or at_end
    if cell.discarded is not None:
        assert cell.discarded in counters.discarded_segments
    if cell.kind in (Kind.DELAY, Kind.SLOW_READER):
        assert counters.discarded_segments == {}
