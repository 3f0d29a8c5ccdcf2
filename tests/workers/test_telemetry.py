"""Followed from its snapshot on, the stream never lies about what is cached."""

import asyncio
import random
import threading
from typing import Any

import msgspec
import pytest

from antiphon.block_hash import BlockHash
from antiphon.messages import Load, Telemetry
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.telemetry import IDLE_LOAD, TelemetryPublisher


class Subscriber:
    """Follows the stream as a router does."""

    wants_telemetry = True

    def __init__(self, publisher: TelemetryPublisher) -> None:
        snapshot = publisher.snapshot()
        assert snapshot.is_snapshot
        self.sequence = snapshot.sequence
        self.cached = set(snapshot.stored)
        self.load = snapshot.load
        self.num_messages = 0

    def send(self, message: Telemetry) -> None:
        assert not message.is_snapshot
        assert message.sequence == self.sequence + 1, "a gap"
        assert not set(message.stored) & set(message.removed)
        self.sequence = message.sequence
        self.cached = (self.cached - set(message.removed)) | set(message.stored)
        self.load = message.load
        self.num_messages += 1


def load(num_running: int) -> Load:
    return Load(num_running, 0, 0, 0, 0.0, 0.0)


def churn(pool: BlockPool, publisher: TelemetryPublisher, seed: int) -> None:
    """What an engine thread does: allocate, publish, release, report."""
    rng = random.Random(seed)
    held: list[list[Any]] = []
    for step in range(400):
        if held and (rng.random() < 0.5 or not pool.num_free):
            pool.release(held.pop(rng.randrange(len(held))))
        elif pool.num_free:
            blocks = pool.allocate(rng.randint(1, min(4, pool.num_free)))
            for block in blocks:
                pool.publish(block, BlockHash(bytes([rng.randrange(40)])))
            held.append(blocks)
        publisher.report(*pool.drain_changes(), load(step))


@pytest.mark.parametrize("seed", range(5))
def test_subscribers_agree_with_the_pool_whenever_they_came(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antiphon.workers.telemetry.PUBLISH_INTERVAL_SECONDS", 0.0005)

    async def scenario() -> None:
        subscribers: list[Subscriber] = []
        publisher = TelemetryPublisher(asyncio.get_running_loop(), lambda: subscribers)  # type: ignore[arg-type,return-value]
        pool = BlockPool(num_blocks=16, block_size=1)
        engine = threading.Thread(target=churn, args=(pool, publisher, seed))
        engine.start()
        while engine.is_alive():
            subscribers.append(Subscriber(publisher))
            await asyncio.sleep(0.001)
        subscribers.append(Subscriber(publisher))
        async with asyncio.timeout(10):
            while publisher._is_scheduled:
                await asyncio.sleep(0.001)
        assert subscribers[0].num_messages > 0
        for subscriber in subscribers:
            assert subscriber.cached == set(pool.cached_hashes())
            assert subscriber.load == load(399)

    asyncio.run(scenario())


def test_what_piles_up_is_one_message_and_nothing_is_no_message() -> None:
    async def scenario() -> None:
        subscribers: list[Subscriber] = []
        publisher = TelemetryPublisher(asyncio.get_running_loop(), lambda: subscribers)  # type: ignore[arg-type,return-value]
        subscribers.append(Subscriber(publisher))
        a, b = BlockHash(b"a"), BlockHash(b"b")
        publisher.report([], [], IDLE_LOAD)
        assert not publisher._is_scheduled, "an unchanged load is no news"
        publisher.report([a, b], [], load(1))
        publisher.report([], [a], load(2))
        publisher.report([a], [b], load(3))
        async with asyncio.timeout(10):
            while publisher._is_scheduled:
                await asyncio.sleep(0.001)
        (subscriber,) = subscribers
        assert subscriber.num_messages == 1
        assert subscriber.cached == {a}
        assert subscriber.load == load(3)

    asyncio.run(scenario())


def test_a_draining_worker_says_so_at_once_and_ever_after() -> None:
    async def scenario() -> None:
        subscribers: list[Subscriber] = []
        publisher = TelemetryPublisher(asyncio.get_running_loop(), lambda: subscribers)  # type: ignore[arg-type,return-value]
        publisher.report([], [], load(1))
        publisher.publish()
        subscribers.append(Subscriber(publisher))
        publisher.drain()  # though the engine has nothing to report
        for num_running in (1, 2):
            async with asyncio.timeout(10):
                while publisher._is_scheduled:
                    await asyncio.sleep(0.001)
            assert subscribers[0].load == msgspec.structs.replace(
                load(num_running), is_draining=True
            )
            publisher.report([], [], load(num_running + 1))

    asyncio.run(scenario())
