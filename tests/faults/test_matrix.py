"""Every fault at every step of a hand-off; the table of them is in ``fault_cells``."""

import asyncio
from typing import Any

import pytest
from fault_cells import Cell, Kind, Step, all_cells
from fault_scene import MAX_TOKENS, OTHER_PROMPT, PROMPT, Scene
from tiny_models import oracle, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    return [oracle(model, prompt, MAX_TOKENS) for prompt in (PROMPT, OTHER_PROMPT)]


@pytest.mark.parametrize("cell", all_cells(), ids=str)
def test_every_fault_is_survived_counted_and_leaves_nothing(
    cell: Cell, model: Any, expected: list[list[int]]
) -> None:
    async def scenario() -> None:
        scene = Scene(cell, model)
        answer, next_answer = await scene.play()
        assert (answer.error, answer.tokens) == (None, expected[0])
        assert (next_answer.error, next_answer.tokens) == (None, expected[1])
        _check_counters(scene, answer.path)
        await scene.check_and_close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def _check_counters(scene: Scene, path: str) -> None:
    cell, (spare, _) = scene.cell, scene.crew.spares
    at_end = cell.step is Step.END
    counters = scene.crew.decode.generate.receiver.counters()
    assert (scene.num_failed_attempts > 0) == (cell.outcome == "again")
    assert (scene.num_replays > 0) == (cell.outcome == "moved")
    if not cell.times_out:  # there the spare, too, may be too slow on a busy machine
        assert (scene.num_fallbacks, path) == (0, "remote")
        # At the end all may have arrived before the fault.
        assert cell.outcome != "again" or spare.engine.stats.num_prompt_tokens or at_end
    if cell.discarded is not None:
        assert cell.discarded in counters.discarded_segments
    if cell.kind in (Kind.DELAY, Kind.SLOW_READER):
        assert counters.discarded_segments == {}
