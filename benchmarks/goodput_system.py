"""Systems of two workers on two cores, and the driver that puts a load on them.

The driver holds the ingress's part, ``ClusterBackend`` with its router and sessions; there is no
Ray and no HTTP, for none of the systems. It runs beside the workers and costs all of them the same.
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from goodput_load import LoadRequest, Outcome, Targets, attainment
from goodput_search import HOPELESS_ATTAINMENT

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import Role, SamplingParams, WorkerCard

_START_SECONDS = 120.0
_IDLE_SECONDS = 30.0
_LOOK_SECONDS = 0.1
_TOKENS = (1000, 40_000)  # ordinary ones


@dataclass(frozen=True, slots=True)
class System:
    """Roles of the two workers, and how their steps and the router know of targets."""

    name: str
    roles: tuple[Role, Role]
    max_batch_tokens: int
    keeps_targets: bool


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in order: the first ones warm up, then those that count, then some to go on with."""

    requests: Sequence[LoadRequest]
    num_warm: int
    num_counted: int


@dataclass(slots=True)
class Measured:
    """One load on one system."""

    rate: float
    attainment: float
    ended_early: bool
    ttft_seconds: list[float]
    tpot_seconds: list[float]
    other_cores: float  # busy with what is not part of the system
    decisions: dict[str, int] = field(default_factory=dict)


class Machine:
    """The two worker processes, which keep their model while systems change."""

    def __init__(self, folder: Path) -> None:
        self._cores = sorted(os.sched_getaffinity(0))[:2]
        script = Path(__file__).with_name("goodput_worker.py")
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(core), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for core in self._cores
        ]

    @asynccontextmanager
    async def running(self, system: System, targets: Targets) -> AsyncIterator["Driver"]:
        """Start the workers of a system and connect to them."""
        target = targets.tpot_seconds if system.keeps_targets else None
        cards = []
        for process, role in zip(self._processes, system.roles, strict=True):
            wanted = {
                "role": role,
                "max_batch_tokens": system.max_batch_tokens,
                "target_itl_seconds": target,
            }
            cards.append(await asyncio.to_thread(_ask, process, wanted))
        router = RouterConfig(
            target_ttft_seconds=targets.ttft_seconds if system.keeps_targets else None,
            target_itl_seconds=target,
        )
        metrics = IngressMetrics()
        backend = ClusterBackend("model", router, set(system.roles), metrics)
        for role in set(system.roles):
            backend.set_workers(role, {c.replica_id: c for c in cards if c.role is role})
        try:
            async with asyncio.timeout(_START_SECONDS):
                while len(backend.describe_workers()) < len(cards) or not backend.is_ready()[0]:
                    await asyncio.sleep(_LOOK_SECONDS)
            yield Driver(backend, metrics, targets, [p.pid for p in self._processes])
        finally:
            await backend.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


class Driver:
    """Sends loads to a running system."""

    def __init__(
        self, backend: ClusterBackend, metrics: IngressMetrics, targets: Targets, pids: list[int]
    ) -> None:
        self._backend = backend
        self._metrics = metrics
        self._targets = targets
        self._pids = [os.getpid(), *pids]
        self._num_sent = 0

    async def measure(self, load: Load, rate: float) -> Measured:
        """Put a load on the system; ends when the counted requests have, or it is hopeless."""
        clock = _CpuClock(self._pids)
        decisions = _decisions(self._metrics)
        outcomes: list[Outcome] = []
        tasks = []
        due_at = time.monotonic() + 0.1
        for request in load.requests:
            due_at += request.gap / rate
            outcomes.append(Outcome(due_at, request.num_output_tokens))
            tasks.append(asyncio.create_task(self._send(request, outcomes[-1])))
        counted = outcomes[load.num_warm : load.num_warm + load.num_counted]
        ended_early = await self._wait(counted, tasks[load.num_warm :][: load.num_counted])
        other_cores = clock.other_cores()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._wait_until_idle()
        now = time.monotonic()
        missed = sum(outcome.is_missed(self._targets, now) for outcome in counted)
        reached = 1 - missed / len(counted) if ended_early else attainment(counted, self._targets)
        decided = _decisions(self._metrics)
        first = [o.first_at - o.due_at for o in counted if o.first_at is not None]
        complete = [o for o in counted if o.num_tokens >= o.num_output_tokens]
        return Measured(
            rate,
            reached,
            ended_early,
            first,
            [_tpot(outcome) for outcome in complete],
            other_cores,
            {key: value - decisions.get(key, 0) for key, value in decided.items()},
        )

    async def idle_seconds(self, num_prompt_tokens: int, num_output_tokens: int) -> Targets:
        """What one request alone takes: to its first token, and between tokens."""
        outcome = Outcome(time.monotonic(), num_output_tokens)
        await self._send(LoadRequest(0.0, num_prompt_tokens, num_output_tokens), outcome)
        assert outcome.first_at is not None, outcome.error
        return Targets(outcome.first_at - outcome.due_at, _tpot(outcome))

    async def _send(self, request: LoadRequest, outcome: Outcome) -> None:
        await asyncio.sleep(outcome.due_at - time.monotonic())
        self._num_sent += 1
        rng = random.Random(f"{os.getpid()} {id(self)} {self._num_sent}")  # never the same again
        prompt = [rng.randrange(*_TOKENS) for _ in range(request.num_prompt_tokens)]
        sampling = SamplingParams(request.num_output_tokens, temperature=0)
        try:
            async with aclosing(
                self._backend.generate(f"r{self._num_sent}", prompt, sampling)
            ) as outputs:
                async for output in outputs:
                    now = time.monotonic()
                    outcome.first_at = outcome.first_at or now
                    outcome.last_at = now
                    outcome.num_tokens += len(output.token_ids)
        except Exception as error:  # a request that fails is a request that misses
            outcome.error = str(error)

    async def _wait(self, counted: list[Outcome], tasks: list[asyncio.Task[None]]) -> bool:
        allowed = (1 - HOPELESS_ATTAINMENT) * len(counted)
        while not all(task.done() for task in tasks):
            now = time.monotonic()
            if sum(outcome.is_missed(self._targets, now) for outcome in counted) > allowed:
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def _wait_until_idle(self) -> None:
        async with asyncio.timeout(_IDLE_SECONDS):
            while any(
                worker["load"]["num_running"] + worker["load"]["num_waiting"]
                for worker in self._backend.describe_workers()
            ):
                await asyncio.sleep(_LOOK_SECONDS)


class _CpuClock:
    """Busy time of the machine beyond that of some processes, since it was made."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._began_at, self._busy, self._ours = self._read()

    def other_cores(self) -> float:
        """Cores that other processes kept busy on average."""
        now, busy, ours = self._read()
        return max((busy - self._busy) - (ours - self._ours), 0.0) / (now - self._began_at)

    def _read(self) -> tuple[float, float, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
        ours = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        busy = user + nice + system + irq + softirq + steal
        return time.monotonic(), busy / ticks, ours / ticks


def _ask(process: "subprocess.Popen[str]", wanted: dict[str, object]) -> WorkerCard:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(wanted) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a worker process ended; its error is above")
    return msgspec.json.decode(line, type=WorkerCard)


def _tpot(outcome: Outcome) -> float:
    assert outcome.first_at is not None
    assert outcome.last_at is not None
    return (outcome.last_at - outcome.first_at) / max(outcome.num_output_tokens - 1, 1)


def _decisions(metrics: IngressMetrics) -> dict[str, int]:
    samples = (s for family in metrics.registry.collect() for s in family.samples)
    return {
        s.labels["reason"]: int(s.value)
        for s in samples
        if s.name == "antiphon_router_decisions_total"
    }
