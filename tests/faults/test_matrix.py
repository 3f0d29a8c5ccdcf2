"""Every fault at every step of a hand-off; the table of them is in ``fault_cells``."""

import asyncio
from typing import Any

import pytest
from fault_cells import Cell, Kind, Party, all_cells
from fault_scene import MAX_TOKENS, OTHER_PROMPT, PROMPT, Scene
from tiny_models import oracle, tiny_model

from antiphon.errors import WorkerLostError


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
        if cell.outcome == "lost":
            assert isinstance(answer.error, WorkerLostError)
            assert answer.tokens == expected[0][: len(answer.tokens)]
        else:
            assert (answer.error, answer.tokens) == (None, expected[0])
        assert (next_answer.error, next_answer.tokens) == (None, expected[1])
        _check_counters(scene, answer.path)
        await scene.check_and_close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def _check_counters(scene: Scene, path: str) -> None:
    cell = scene.cell
    counters = scene.crew.decode.generate.receiver.counters()
    assert (scene.num_failures > 0) == (cell.outcome == "again")
    assert (scene.num_moves > 0) == (cell.outcome in ("moved", "lost"))
    if cell.outcome == "remote":
        assert path == "remote"
    if cell.discarded is not None:
        assert cell.discarded in counters.discarded_segments
    if cell.party is Party.LINK and cell.kind in (Kind.DELAY, Kind.SLOW_READER):
        assert counters.discarded_segments == {}
