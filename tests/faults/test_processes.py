"""Real worker processes under load: some are killed, some stop and come back as ghosts."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from load import Load, greedy_items
from pools import until
from process_cluster import SILENCE_SECONDS, Nursery, ProcessCluster, cluster, nursery
from tiny_models import tiny_model

from antiphon.messages import Role

pytestmark = pytest.mark.e2e
NUM_CLIENTS = 12

Scenario = Callable[[ProcessCluster, Load], Awaitable[None]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def model_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def items(model: Any) -> list[Any]:
    return greedy_items(model, 16)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery") / "log") as opened:
        yield opened


@pytest.fixture
def play(
    forks: Nursery, model_folder: Path, items: list[Any], tmp_path: Path
) -> Callable[[Scenario], None]:
    """Run a scenario beside a load; every client gets all of its tokens, and then all are idle."""

    async def run(scenario: Scenario) -> None:
        async with cluster(forks, model_folder, tmp_path) as opened:
            load = Load(opened.backend, items)
            running = asyncio.create_task(load.run(NUM_CLIENTS))
            try:
                await more(load, NUM_CLIENTS)
                await scenario(opened, load)
            finally:
                load.stop()
                await running
            assert load.tally.wrong == []
            assert load.tally.num_errors == 0, load.tally.outcomes
            await opened.wait_idle()

    return lambda scenario: asyncio.run(asyncio.wait_for(run(scenario), 150))


async def more(load: Load, num_requests: int) -> None:
    """Wait for that many more right answers."""
    wanted = load.tally.outcomes["right"] + num_requests
    async with asyncio.timeout(60):
        while load.tally.outcomes["right"] < wanted:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_workers_are_killed_and_replaced_under_load(play: Any, role: Role) -> None:
    async def scenario(opened: ProcessCluster, load: Load) -> None:
        for _ in range(3):
            victim = opened.of(role)[0]
            victim.signal(signal.SIGKILL)
            await more(load, NUM_CLIENTS)
            await opened.bury(victim)
            await opened.start(role, victim.card.replica_id)  # a stranger under the old name
            await more(load, NUM_CLIENTS)

    play(scenario)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_worker_that_stops_is_given_up_and_its_ghost_does_no_harm(play: Any, role: Role) -> None:
    async def scenario(opened: ProcessCluster, load: Load) -> None:
        victim = opened.of(role)[0]
        victim.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        await more(load, NUM_CLIENTS)
        if role is Role.DECODE:
            lost = "antiphon_router_sessions_lost_total"
            await until(lambda: opened.metrics.count(lost, pool="decode") == 1)
            assert time.monotonic() - stopped_at < 2 * SILENCE_SECONDS  # the default is longer
        victim.signal(signal.SIGCONT)
        await more(load, 4 * NUM_CLIENTS)

    play(scenario)
