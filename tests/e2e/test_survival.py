"""The application loses and changes workers under load, and no request notices more than a pause.

Real processes under Serve, with a tiny model; each stream must be what it is when nothing happens.
"""

import asyncio
import json
import os
import signal
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import Product, free_port, wait_for
from tiny_folder import save_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[1] / "support/updatable.py"
NUM_STREAMS = 4
MAX_TOKENS = 400  # seconds, so that much can happen meanwhile


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("survival")
    model = save_tiny_model(folder / "tiny", smollm2_path)
    port = free_port()
    started = Product(["python", str(SCRIPT), str(port), str(model)], port, folder)
    try:
        started.wait_until_ready()
        wait_for(lambda: len(started.workers("decode")) == 2, 60)
        yield started
    finally:
        started.stop()


def body(index: int) -> dict[str, Any]:
    """A stream of its own prompt and seed; half of them are greedy."""
    return {
        "model": "tiny",
        "prompt": [100 + index, *range(7, 77)],
        "max_tokens": MAX_TOKENS,
        "temperature": index % 2,
        "seed": index,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Load:
    """Streams that are read until they end; whatever is not perfect is kept as a problem."""

    def __init__(self, product: Product) -> None:
        self._url = f"{product.url}/v1/completions"
        self.num_events = [0] * NUM_STREAMS
        self.problems: list[str] = []

    async def stream(self, session: aiohttp.ClientSession, index: int) -> str:
        text, usage, is_done = "", None, False
        async with session.post(self._url, json=body(index)) as answer:
            if answer.status != 200:
                self.problems.append(f"{answer.status} {await answer.text()}")
                return text
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                if data == "[DONE]":
                    is_done = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        self.problems.append(data)
                        return text
                    self.num_events[index] += 1
                    text += "".join(choice["text"] for choice in event["choices"])
                    usage = event.get("usage") or usage
        if not is_done or usage["completion_tokens"] != MAX_TOKENS:
            self.problems.append(f"ended early: done {is_done}, usage {usage}")
        return text

    async def all(self) -> list[str]:
        timeout = aiohttp.ClientTimeout(total=200)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            streams = (self.stream(session, index) for index in range(NUM_STREAMS))
            return list(await asyncio.gather(*streams))


@pytest.fixture(scope="module")
def undisturbed(product: Product) -> list[str]:
    load = Load(product)
    texts = asyncio.run(load.all())
    assert not load.problems
    return texts


def is_ready(product: Product) -> bool:
    try:
        return bool(product.get("/ready")["status"] == "ready")
    except urllib.error.HTTPError as error:
        return error.code != 503


async def until_streaming(load: Load) -> None:
    async with asyncio.timeout(60):
        while min(load.num_events) < 5:
            await asyncio.sleep(0.01)


def rounds_while(product: Product, is_going_on: Callable[[], bool]) -> tuple[list[list[str]], Load]:
    """Send the same streams again and again for as long as something goes on, and once more."""
    load = Load(product)
    texts: list[list[str]] = []
    while is_going_on():
        texts.append(asyncio.run(load.all()))
    texts.append(asyncio.run(load.all()))
    return texts, load


def test_streams_outlive_a_decode_worker_whose_process_is_told_to_end(
    product: Product, undisturbed: list[str]
) -> None:
    """Ray ends it in some order of its own; one that is killed is in tests/faults."""

    async def scenario() -> list[str]:
        load = Load(product)
        streams = asyncio.create_task(load.all())
        await until_streaming(load)
        workers = await asyncio.to_thread(product.workers, "decode")
        victim = max(workers, key=lambda worker: worker["load"]["num_running"])
        os.kill(victim["pid"], signal.SIGTERM)
        texts = await streams
        assert not load.problems
        return texts

    assert asyncio.run(scenario()) == undisturbed
    assert product.metric("antiphon_replays_total", reason="lost", outcome="resumed") >= 1
    wait_for(lambda: len(product.workers("decode")) == 2, 60)


def members(product: Product) -> dict[str, set[str]]:
    """Incarnations of the workers, and replicas of the ingress."""
    found: dict[str, set[str]] = {"prefill": set(), "decode": set(), "ingress": set()}
    for target in product.get("/metrics/targets"):
        if target["labels"]["pool"] == "ingress":
            found["ingress"].add(target["labels"]["worker"])
    for worker in product.get("/workers"):
        found[worker["role"]].add(worker["incarnation"])
    return found


def change_under_load(
    product: Product, undisturbed: list[str], change: signal.Signals, num_decode: int
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Change the application, with streams all the time; return who served before and after."""
    num_changes = product.log.read_text().count("changed")
    before = members(product)
    product.process.send_signal(change)
    texts, load = rounds_while(
        product, lambda: product.log.read_text().count("changed") == num_changes
    )
    assert not load.problems
    assert all(one == undisturbed for one in texts)
    assert len(texts) > 1, "nothing was sent while the application changed"
    wait_for(lambda: len(product.workers("decode")) == num_decode, 30)
    return before, members(product)


def decode_processes(product: Product) -> set[int]:
    """Those that Ray has made replicas of the pool, though they may still load."""
    name = "ServeReplica:antiphon:decode"
    return {pid for pid, command in product.processes().items() if name in command}


def test_other_arguments_replace_everybody_and_no_request_is_lost(
    product: Product, undisturbed: list[str]
) -> None:
    """Though the first of the new decode workers dies while it loads."""
    old = decode_processes(product)
    assert len(old) == 2

    def kill_a_new_one() -> None:
        wait_for(lambda: bool(decode_processes(product) - old), 60)
        os.kill(min(decode_processes(product) - old), signal.SIGKILL)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_a_new_one)
        before, after = change_under_load(product, undisturbed, signal.SIGUSR1, num_decode=2)
        killing.result(0)
    assert not any(after[pool] & before[pool] for pool in before)


@pytest.mark.parametrize(("num_decode", "num_ingresses"), [(3, 2), (1, 1)])
def test_other_sizes_restart_nobody_and_no_request_is_lost(
    product: Product, undisturbed: list[str], num_decode: int, num_ingresses: int
) -> None:
    """After the update: Serve's first document replaces whom the command has started."""
    before, after = change_under_load(product, undisturbed, signal.SIGUSR2, num_decode)
    assert after["prefill"] == before["prefill"]
    for pool, size in (("decode", num_decode), ("ingress", num_ingresses)):
        fewer, more = sorted((before[pool], after[pool]), key=len)
        assert fewer < more
        assert len(after[pool]) == size


def test_nothing_is_left_on_the_workers(product: Product) -> None:
    def is_idle() -> bool:
        loads = [(worker["load"], worker["num_blocks"]) for worker in product.get("/workers")]
        return all(load and load["num_free_blocks"] == num_blocks for load, num_blocks in loads)

    wait_for(is_idle, 30)


def test_a_stop_finishes_open_streams_and_refuses_new_ones(
    product: Product, undisturbed: list[str]
) -> None:
    """The last test of this file: it ends the product."""

    async def scenario() -> None:
        load, late = Load(product), Load(product)
        streams = asyncio.create_task(load.all())
        await until_streaming(load)
        product.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: not is_ready(product), 30)
        refused = await late.all()
        assert await streams == undisturbed
        assert not load.problems
        assert refused == [""] * NUM_STREAMS
        assert all(problem.startswith("503 ") for problem in late.problems)
        assert "being stopped" in late.problems[0]

    asyncio.run(scenario())
    assert product.process.wait(60) == 0
