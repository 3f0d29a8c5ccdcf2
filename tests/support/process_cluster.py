"""Pools of worker processes and an ingress; the test plays Serve, and may be unkind."""

import asyncio
import base64
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import worker_process
from pools import until

from antiphon.config import EngineConfig, HandoffConfig, ModelConfig, RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import Role, WorkerCard
from antiphon.workers.worker_settings import WorkerSettings

START_SECONDS = 60.0
IDLE_SECONDS = 30.0  # within which all are idle; a link may wait 10 s for a peer that was stopped
SILENCE_SECONDS = 3.0  # after which an ingress gives up a worker that answers no ping
GIVE_UP_SECONDS = 1.5  # a prefill worker that sends nothing for this long is given up


class WorkerProcess:
    """One running worker, and a line to it."""

    def __init__(self, card: WorkerCard, streams: tuple[Any, Any]) -> None:
        self.card = card
        self._reader, self._writer = streams

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; harmless if it is dead."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.card.pid, number)

    async def state(self) -> dict[str, Any]:
        """See ``worker_process.describe``."""
        answer: dict[str, Any] = await self._ask(b"state\n")
        return answer

    async def used_bytes(self) -> int:
        """See ``worker_process.used_bytes``."""
        return int(await self._ask(b"memory\n"))

    async def _ask(self, line: bytes) -> Any:
        self._writer.write(line)
        async with asyncio.timeout(START_SECONDS):
            return json.loads(await self._reader.readline())

    @property
    def is_alive(self) -> bool:
        """Whether the process exists; one that is stopped does."""
        return Path(f"/proc/{self.card.pid}").exists()

    @property
    def resident_bytes(self) -> int:
        """Memory that the process has in use."""
        return resident_bytes(self.card.pid)

    async def end(self) -> None:
        """Let it close and end, even if it was stopped; returns when it has."""
        self._writer.close()
        self.signal(signal.SIGCONT)
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        await until(lambda: not self.is_alive, START_SECONDS)


class Nursery:
    """The process that workers are forked from; it has torch and everything else in memory."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, worker_process.__file__],
                stdin=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    async def start(self, folder: Path, settings: WorkerSettings) -> WorkerProcess:
        """Fork a worker and wait for its card."""
        connected: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
        path = folder / uuid.uuid4().hex[:12]
        server = await asyncio.start_unix_server(
            lambda *streams: connected.set_result(streams), path
        )
        order = {
            "report_to": str(path),
            "settings": base64.b64encode(pickle.dumps(settings)).decode(),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        async with asyncio.timeout(START_SECONDS):
            streams = await connected
            card = msgspec.json.decode(await streams[0].readline(), type=WorkerCard)
        server.close()
        await server.wait_closed()
        return WorkerProcess(card, streams)

    def close(self) -> None:
        """End it; its workers end by themselves."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_SECONDS)


@contextlib.contextmanager
def nursery(log: Path) -> Iterator[Nursery]:
    """A nursery for a ``with`` block."""
    opened = Nursery(log)
    try:
        yield opened
    finally:
        opened.close()


class ProcessCluster:
    """Two pools of two, by default, and the ingress's backend over them."""

    def __init__(self, nursery: Nursery, model_folder: Path, sockets: Path) -> None:
        self._nursery = nursery
        self._model_folder = model_folder
        self._sockets = sockets
        self.workers: dict[str, WorkerProcess] = {}  # by replica id; those that Serve would list
        self.metrics = IngressMetrics()
        self.backend = ClusterBackend(
            "tiny",
            RouterConfig(local_prefill_max_tokens=8, silence_seconds=SILENCE_SECONDS),
            {Role.PREFILL, Role.DECODE},
            self.metrics,
        )

    async def start(self, role: Role, replica_id: str) -> WorkerProcess:
        """Start a worker, or its next life under the same name, and list it."""
        worker = await self._nursery.start(self._sockets, self._settings(role, replica_id))
        self.workers[replica_id] = worker
        self._list(role)
        await until(
            lambda: self.backend._view.get(worker.card.incarnation) is not None, START_SECONDS
        )
        return worker

    async def bury(self, worker: WorkerProcess) -> None:
        """List a worker that was killed no more."""
        del self.workers[worker.card.replica_id]
        self._list(worker.card.role)
        await worker.end()

    def of(self, role: Role) -> list[WorkerProcess]:
        """The listed workers of a pool."""
        return [worker for worker in self.workers.values() if worker.card.role is role]

    async def wait_idle(self) -> list[dict[str, Any]]:
        """Wait until no listed worker holds anything; return their states."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            states = [await worker.state() for worker in self.workers.values()]
            problems = [state["problem"] for state in states]
            if not any(problems):
                return states
            assert time.monotonic() < deadline, f"not idle: {problems}"
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End everything."""
        await self.backend.close()
        await asyncio.gather(*(worker.end() for worker in self.workers.values()))

    def _list(self, role: Role) -> None:
        cards = {worker.card.replica_id: worker.card for worker in self.of(role)}
        self.backend.set_workers(role, cards)

    def _settings(self, role: Role, replica_id: str) -> WorkerSettings:
        budget = 32 if role is Role.PREFILL else None  # so that prompts come in several segments
        return WorkerSettings(
            role=role,
            replica_id=replica_id,
            host="127.0.0.1",
            model_folder=self._model_folder,
            model=ModelConfig(),
            engine=EngineConfig(kv_cache_bytes="1MiB", max_batch_tokens=budget),  # type: ignore[arg-type]
            silence_seconds=SILENCE_SECONDS,
            handoff=HandoffConfig(stall_seconds=GIVE_UP_SECONDS, piece_bytes="16KiB"),  # type: ignore[arg-type]
        )


@contextlib.asynccontextmanager
async def cluster(
    nursery: Nursery, model_folder: Path, sockets: Path, num_each: int = 2
) -> AsyncIterator[ProcessCluster]:
    """A running cluster for an ``async with`` block."""
    opened = ProcessCluster(nursery, model_folder, sockets)
    try:
        await asyncio.gather(
            *(
                opened.start(role, f"{role}-{number}")
                for role in (Role.PREFILL, Role.DECODE)
                for number in range(num_each)
            )
        )
        yield opened
    finally:
        await opened.close()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
