"""Faults of the monitored system, each of which some alert is about.

They overlap where they can, and are never undone but for what would keep the system from closing:
the test ends with a system that nobody would want.
"""

import asyncio
import random
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from crew import watch
from fault_cells import Step
from faulty_transport import FaultyLink, Message, Send
from monitored_system import MAX_CHOICES, MonitoredSystem, client, monitored_system, post
from pools import Client, peer_of, until
from processes import free_port
from prometheus_server import Prometheus
from tiny_models import VOCAB_SIZE

from antiphon.deployment.api_keys import ApiKeys
from antiphon.messages import PrefillPeer, Role
from antiphon.workers.batch import Batch

_SLOW_SEND_SECONDS = 0.2
_SLOW_STEP_SECONDS = 0.02
_NUM_REPEATS = 60
_NUM_BREAKS = 5
_PROMPT_TOKENS = 70
_NUM_CUTS, _NUM_REPLAYS = 6, 10
_LOST = {"reason": "lost", "outcome": "resumed"}
_LOOK_SECONDS = 1.2  # the rule looks at one moment in each minute
_HOLD_SECONDS = 90.0  # never what ends a fault


class Faults:
    """What is wrong at the moment, and what makes it so."""

    def __init__(self) -> None:
        self._is_sending_slowly = False
        self._corrupts_next = False
        self._repeats_next = False
        self._num_received: Counter[FaultyLink] = Counter()
        self._reader_goes_on = threading.Event()
        self._reader_goes_on.set()
        self._engines_go_on = threading.Event()

    def system(self) -> Any:
        """A running system whose links are at the mercy of these faults."""
        return monitored_system(self._on_send, self._on_received)

    def release(self) -> None:
        """Let go of every thread that is held."""
        self._reader_goes_on.set()
        self._engines_go_on.set()

    # On the threads of links.

    def _on_send(self, step: Step, link: FaultyLink, message: Message, send: Send) -> None:
        if self._is_sending_slowly and step in (Step.FIRST, Step.MIDDLE):
            time.sleep(_SLOW_SEND_SECONDS)
        if self._corrupts_next and step in (Step.FIRST, Step.MIDDLE):
            self._corrupts_next = False
            *others, last = message
            damaged = last.clone()
            damaged[-1] ^= 1
            message = [*others, damaged]
        send(message)
        if self._repeats_next and step is Step.END:
            self._repeats_next = False
            for _ in range(_NUM_REPEATS):
                send(message)

    def _on_received(self, link: FaultyLink) -> None:
        self._num_received[link] += 1
        if self._num_received[link] > 1:  # a link that has not greeted holds no staging
            self._reader_goes_on.wait(_HOLD_SECONDS)

    # On the event loop.

    async def disturb(
        self, system: MonitoredSystem, session: aiohttp.ClientSession, server: Prometheus
    ) -> None:
        """Make the faults that leave every hand-off possible; the last of them makes it slow."""
        for ingress in system.ingresses:
            ingress.wanted[Role.COLOCATED] += 1  # and none comes
        system.spawn(_ask_for_hand_offs(system))
        system.spawn(_ask_who_is_gone(system))
        system.spawn(_overload(system))  # or it would take all requests, since it needs no hand-off
        await _break_links(system)  # while they are mostly idle, and breaking shuns nobody
        await self._damage_messages()
        await _cut_sessions(system, session)
        system.spawn(_spoil_the_key_file(system))
        self._is_sending_slowly = True
        await _short_lives(system, server)

    def obstruct(self, system: MonitoredSystem, session: aiohttp.ClientSession) -> None:
        """Make those that hand-offs fail of, or that leave an ingress no room for any."""
        self._reader_goes_on.clear()
        system.decode[1]._telemetry.publish = lambda: None  # type: ignore[method-assign]
        system.spawn(_drain_for_ever(system))
        system.spawn(_ask_too_much(system, session))
        _fail_a_step(system)

    async def _damage_messages(self) -> None:
        self._repeats_next = True
        await until(lambda: not self._repeats_next)
        self._corrupts_next = True
        await until(lambda: not self._corrupts_next)

    def slow_sessions(self, system: MonitoredSystem, seconds: float) -> None:
        """Let what passes between the first ingress and its decode workers take so long.

        No router has a notion of that; and where all are as slow, none is avoided.
        """
        for proxy in system.proxies:
            proxy.delay_seconds = seconds

    def hang(self, system: MonitoredSystem) -> None:
        """Hold every engine: one that goes on would be progress."""
        for worker in (*system.prefill, *system.decode, *system.others):
            worker.engine.call(lambda _: self._engines_go_on.wait(_HOLD_SECONDS))


async def _drain_for_ever(system: MonitoredSystem) -> None:
    await system.prefill[1].drain(_HOLD_SECONDS)


async def _overload(system: MonitoredSystem) -> None:
    """Fill the colocated worker's cache and queue, faster than its slow steps can empty them."""
    watch(system.colocated, lambda batch: time.sleep(_SLOW_STEP_SECONDS))
    flooding = await Client.connect(system.colocated)
    while True:
        flooding.submit([5] * 20, 60)
        await asyncio.sleep(0.05)


async def _ask_too_much(system: MonitoredSystem, session: aiohttp.ClientSession) -> None:
    """Be refused, again and again."""
    while True:
        await asyncio.gather(
            *(post(session, system.ingresses[0].url, prompt=[7], n=MAX_CHOICES) for _ in range(4))
        )
        await asyncio.sleep(0.3)


async def _spoil_the_key_file(system: MonitoredSystem) -> None:
    """Empty a file of keys that the first ingress looks at, as each request makes it do."""
    with tempfile.NamedTemporaryFile("w") as file:
        print("a-key", file=file, flush=True)
        keys = ApiKeys(Path(file.name), system.ingresses[0].metrics)
        file.truncate(0)
        while True:
            keys.refuses("Bearer a-key")
            await asyncio.sleep(0.1)


async def _cut_sessions(system: MonitoredSystem, session: aiohttp.ClientSession) -> None:
    """Cut those with one worker while streams pass, until enough of them went on at the other."""
    first = system.ingresses[0]
    # With fewer, the router may well have a use for the other worker alone.
    more = [system.spawn(client(session, first.url, seed)) for seed in range(100, 108)]
    num_cuts = 0
    async with asyncio.timeout(_HOLD_SECONDS):
        while (
            num_cuts < _NUM_CUTS
            or first.metrics.count("antiphon_replays_total", **_LOST) < _NUM_REPLAYS
        ):
            await asyncio.sleep(0.05)
            connection = first.backend.sessions.get(system.decode[0].card.incarnation)
            if connection is not None and connection.num_requests:
                system.proxies[0].cut()
                num_cuts += 1
                await asyncio.sleep(0.3)
    for task in more:
        task.cancel()


async def _break_links(system: MonitoredSystem) -> None:
    """Break them in use, until enough did; each is made anew for the next hand-off."""
    metrics = system.decode[1].metrics
    async with asyncio.timeout(_HOLD_SECONDS):
        while metrics.count("antiphon_handoff_links_broken_total") < _NUM_BREAKS:
            for link in system.senders[0].links:
                link.close()
            await asyncio.sleep(0.2)


async def _ask_for_hand_offs(system: MonitoredSystem) -> None:
    """Want one after the other at the second decode worker, wherever routers send theirs."""
    asking = await Client.connect(system.decode[1])
    rng = random.Random(1)
    while True:
        await asking.finish(asking.submit(_prompt(rng), 2, peer_of(system.prefill[0])))
        await asyncio.sleep(0.05)


async def _ask_who_is_gone(system: MonitoredSystem) -> None:
    """Name prefill workers to the first decode worker that have just ended.

    Each is a stranger, so none is shunned; and the decode worker computes the prompt itself.
    """
    asking = await Client.connect(system.decode[0])
    rng = random.Random(2)
    while True:
        gone = PrefillPeer(f"ws://127.0.0.1:{free_port()}/session", uuid.uuid4().hex)
        await asking.finish(asking.submit(_prompt(rng), 2, gone))
        await asyncio.sleep(0.05)


def _prompt(rng: random.Random) -> list[int]:
    return rng.choices(range(3, VOCAB_SIZE), k=_PROMPT_TOKENS)


def _fail_a_step(system: MonitoredSystem) -> None:
    steps = iter(range(1_000_000))

    def on_step(batch: Batch) -> None:
        if next(steps) == 50:
            raise RuntimeError("a step fails")

    watch(system.decode[0], on_step)


async def _short_lives(system: MonitoredSystem, server: Prometheus) -> None:
    """Workers that only the first ingress is told of, and of which all but one soon end."""
    hidden, *others = [await system.start_worker(Role.DECODE) for _ in range(4)]
    system.others.append(hidden)
    system.list_decode(hidden, *others)
    names = "|".join(worker.card.incarnation for worker in others)
    async with asyncio.timeout(_HOLD_SECONDS):
        while len(await server.query(f'antiphon_worker_info{{incarnation=~"{names}"}}')) < 3:
            await asyncio.sleep(0.1)
    await asyncio.sleep(_LOOK_SECONDS)
    system.list_decode(hidden)
    for worker in others:
        await worker.close()


async def lose_colocated(system: MonitoredSystem) -> None:
    """End the server of a worker that is listed on."""
    for session in system.colocated._server.sessions:
        session.cut()
    await system.colocated._server.close()
