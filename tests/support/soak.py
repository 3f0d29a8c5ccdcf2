"""A soak: known requests for minutes, while clients leave and worker processes die or stop.

    python soak.py --seconds 600 [--seed 0]

Two pools of two. The first worker of each pool is never killed, only stopped for a while, so its
memory can be watched from beginning to end; the second is killed again and again and comes back as
a stranger under its old name. Every token is compared. At the end nothing may be held, memory must
be where it was after the warm-up, and enough must have been asked, killed and stopped for that to
say something. The exit status says whether all of that was so.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from live_bytes import live_bytes
from load import Load, greedy_items, seeded_items
from process_cluster import ProcessCluster, WorkerProcess, cluster, nursery, resident_bytes
from tiny_models import tiny_model

from antiphon.messages import Role

NUM_CLIENTS = 12
NUM_GREEDY, NUM_SEEDED = 20, 12  # different requests
CANCEL_RATE = 0.15
REPORT_SECONDS = 30.0
WARM_UP_RATIO = 0.25  # of the time, after which memory must not grow any more
MAX_GROWTH_BYTES = 24 << 20  # per process: what allocators and caches of an interpreter wander
# Of memory in use, which wanders less: for each request of a client's, of which an elder has half.
MAX_LEAK_BYTES = 2 << 10
LEAK_SLACK_BYTES = 1 << 20  # caches that fill up to a bound; requests that were open at first
LEAST_REQUESTS = 6.0  # a second; a quiet machine has 26
LEAST_BLOWS = 1 / 40  # a second, of each kind; a quiet machine has 1/8 and 1/10
PAUSE_SECONDS = (0.5, 3.0)  # between two blows
STOP_SECONDS = (0.2, 9.0)  # beyond what a hand-off and a heartbeat wait
MAX_IDLE_TASKS = 40  # of a worker: its sessions, their readers and writers, a server
MAX_IDLE_THREADS = 96  # of a worker: one for each of at most 64 links, and pools of threads


class Soak:
    """One run."""

    def __init__(self, opened: ProcessCluster, load: Load, seconds: float, seed: int) -> None:
        self._cluster = opened
        self._load = load
        self._seconds = seconds
        self._rng = random.Random(seed)
        self._blows: Counter[str] = Counter()
        self._elders = [opened.of(role)[0] for role in (Role.PREFILL, Role.DECODE)]
        self._warm: dict[str, int] = {}
        self._used: asyncio.Task[dict[str, tuple[int, int]]] | None = None  # after the warm-up
        self._is_over = asyncio.Event()
        self.violations: list[str] = []

    async def run(self) -> None:
        """Play, report, and collect violations."""
        began = time.monotonic()
        load = asyncio.create_task(self._load.run(NUM_CLIENTS))
        storm = asyncio.create_task(self._storm())
        try:
            while (elapsed := time.monotonic() - began) < self._seconds:
                await asyncio.sleep(min(REPORT_SECONDS, self._seconds / 10))
                if not self._warm and elapsed > WARM_UP_RATIO * self._seconds:
                    self._warm = self._memory()
                    self._used = asyncio.create_task(self._used_bytes())
                self._report(time.monotonic() - began)
                if load.done() or storm.done():
                    break
        finally:
            self._is_over.set()
            self._load.stop()
            await asyncio.wait({storm, load})
        self._violated_by(storm, "the storm")
        self._violated_by(load, "the load")
        self._check_that_enough_happened()
        await self._check_end()
        self._report(time.monotonic() - began)

    async def _storm(self) -> None:
        """Blow at one worker after the other; each pool always has one that is left in peace."""
        while not await self._is_over_within(self._rng.uniform(*PAUSE_SECONDS)):
            role = self._rng.choice((Role.PREFILL, Role.DECODE))
            elder, other = self._cluster.of(role)
            if self._rng.random() < 0.6:
                await self._kill(other)
            else:
                await self._stop_for_a_while(self._rng.choice((elder, other)))

    async def _kill(self, victim: WorkerProcess) -> None:
        self._blows[f"{victim.card.role} killed"] += 1
        victim.signal(signal.SIGKILL)
        await self._is_over_within(self._rng.uniform(0, 1.0))
        await self._cluster.bury(victim)
        await self._cluster.start(victim.card.role, victim.card.replica_id)

    async def _stop_for_a_while(self, victim: WorkerProcess) -> None:
        self._blows[f"{victim.card.role} stopped"] += 1
        victim.signal(signal.SIGSTOP)
        await self._is_over_within(self._rng.uniform(*STOP_SECONDS))
        victim.signal(signal.SIGCONT)

    async def _is_over_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_over.wait(), seconds)
        return self._is_over.is_set()

    async def _check_end(self) -> None:
        tally = self._load.tally
        self.violations += tally.wrong
        if tally.num_errors or not tally.outcomes["right"]:
            self.violations.append(f"clients got errors, or nothing: {dict(tally.outcomes)}")
        before = await self._used if self._used is not None else {}
        try:
            states = await self._cluster.wait_idle()
        except (AssertionError, TimeoutError) as error:
            self.violations.append(f"workers do not come to rest: {error}")
            return
        for worker, state in zip(self._cluster.workers.values(), states, strict=True):
            if state["num_tasks"] > MAX_IDLE_TASKS or state["num_threads"] > MAX_IDLE_THREADS:
                self.violations.append(f"{worker.card.replica_id} has piled up: {state}")
        for name, num_bytes in self._memory().items():
            if num_bytes - self._warm.get(name, num_bytes) > MAX_GROWTH_BYTES:
                self.violations.append(f"{name} grew from {self._warm[name]} to {num_bytes} bytes")
        await self._check_leaks(before)

    async def _check_leaks(self, before: dict[str, tuple[int, int]]) -> None:
        after = await self._used_bytes()
        for name, (num_bytes, num_requests) in before.items():
            growth, num_since = after[name][0] - num_bytes, after[name][1] - num_requests
            print(f"{name}: {growth} bytes more in use after {num_since} requests", flush=True)
            if growth > LEAK_SLACK_BYTES + num_since * MAX_LEAK_BYTES:
                self.violations.append(f"{name} leaks {growth} bytes in {num_since} requests")

    def _check_that_enough_happened(self) -> None:
        seconds, num_requests = self._seconds, self._load.tally.outcomes.total()
        if num_requests < LEAST_REQUESTS * seconds or self._used is None:
            self.violations.append(f"only {num_requests} requests in {seconds:.0f} s")
        for kind in ("killed", "stopped"):
            num_blows = sum(n for name, n in self._blows.items() if name.endswith(kind))
            if num_blows < max(1, int(LEAST_BLOWS * seconds)):
                self.violations.append(f"only {num_blows} workers {kind} in {seconds:.0f} s")

    async def _used_bytes(self) -> dict[str, tuple[int, int]]:
        """Of each process that lives all along, with how many requests had ended by then."""
        used = {"driver": (live_bytes(), self._load.tally.outcomes.total())}
        for elder in self._elders:
            num_bytes = await elder.used_bytes()  # one that is stopped answers later
            used[elder.card.replica_id] = (num_bytes, self._load.tally.outcomes.total())
        return used

    def _violated_by(self, task: asyncio.Task[None], name: str) -> None:
        if (error := task.exception()) is not None:
            self.violations.append(f"{name} broke: {error!r}")

    def _memory(self) -> dict[str, int]:
        gc.collect()
        memory = {elder.card.replica_id: elder.resident_bytes for elder in self._elders}
        return {**memory, "driver": resident_bytes(os.getpid())}

    def _report(self, elapsed: float) -> None:
        tally = self._load.tally
        memory = {name: f"{size >> 20} MiB" for name, size in self._memory().items()}
        print(
            f"{elapsed:5.0f} s  {tally.outcomes.total()} requests {dict(tally.outcomes)}  "
            f"{tally.num_tokens} tokens, {len(tally.wrong)} wrong  "
            f"slowest {tally.slowest_seconds:.1f} s  {dict(self._blows)}  {memory}",
            flush=True,
        )


async def soak(folder: Path, seconds: float, seed: int, log: Path) -> list[str]:
    """Run a soak of about ``seconds``; returns what was violated."""
    model: Any = tiny_model("llama")
    model_folder = folder / "model"
    tiny_model("llama").save_pretrained(model_folder)
    items = greedy_items(model, NUM_GREEDY, seed)
    with nursery(log) as forks:
        async with cluster(forks, model_folder, folder) as opened:
            items += await seeded_items(opened.backend, NUM_SEEDED, seed + 1)
            run = Soak(opened, Load(opened.backend, items, CANCEL_RATE, seed), seconds, seed)
            await run.run()
            return run.violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # that workers are lost is the point
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        violations = asyncio.run(soak(Path(folder), arguments.seconds, arguments.seed, log))
        if violations:
            print(log.read_text()[-10_000:])
    print("\n".join(violations) or f"nothing was violated (seed {arguments.seed})")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
