"""Two ingresses and five workers in this process, with HTTP and gloo between them, and load.

The test plays Serve: it says which workers there are, and asks all ingresses where they are. The
first ingress has targets that are easily kept, the second some that cannot be. Prefill workers send
through transports that the test controls, and the second decode worker receives through one;
sessions of the first ingress with decode workers pass proxies.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import msgspec
import uvicorn
from faulty_transport import FaultyTransport, OnReceived, OnSend
from handoff_pair import handoff_threads
from msgspec import structs
from pools import start, until
from scripted_backend import CharTokenizer
from session_proxy import SessionProxy
from tiny_models import VOCAB_SIZE, tiny_model

from antiphon.config import EngineConfig, HandoffConfig, RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_app import create_app
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.metrics_targets import AskAll, IngressAddress, Siblings, discovered
from antiphon.messages import Role, WorkerCard
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.metrics_server import MetricsServer
from antiphon.workers.worker import Worker

ROLES = {Role.PREFILL, Role.DECODE, Role.COLOCATED}
MAX_CHOICES = 16  # at once, of an ingress
_CHUNK_TOKENS = 16
_PROMPT_TOKENS, _SHARED_TOKENS, _MAX_TOKENS = 70, 32, 80
# A stall is longer than slow sends for all clients of an ingress, one after the other.
_HANDOFF = HandoffConfig(piece_bytes=0, stall_seconds=1.5, timeout_seconds=3)
_REQUEST_SECONDS = 15.0  # or a few clients would wait for the colocated worker alone


class Ingress:
    """One ingress, joined as ``deployment.ingress`` joins it, but without Serve."""

    def __init__(self, number: int, target_seconds: float, ask_all: AskAll) -> None:
        self._name = f"ingress#{number}"
        self._ask_all = ask_all
        config = RouterConfig(
            local_prefill_max_tokens=0,
            target_ttft_seconds=target_seconds,
            target_itl_seconds=target_seconds,
        )
        self.metrics = IngressMetrics(config)
        self.backend = ClusterBackend("tiny", config, ROLES, self.metrics)
        self.wanted = {Role.PREFILL: 2, Role.DECODE: 2, Role.COLOCATED: 1}  # what Serve is to run
        self.backend.count_wanted(lambda: self.wanted)
        self._app = create_app(
            self.backend,
            CharTokenizer(),
            max_concurrent_requests=MAX_CHOICES,
            metrics=self.metrics,
        )
        self._server = _Server(
            uvicorn.Config(self._app, port=0, log_level="critical", ws="none", lifespan="off")
        )

    async def start(self) -> None:
        """Listen, for clients and for Prometheus."""
        self._metrics_server = MetricsServer(self.metrics.render)
        scraped_at = await self._metrics_server.listen("127.0.0.1")
        self.address = IngressAddress(self._name, "node-1", f"127.0.0.1:{scraped_at}")
        siblings = Siblings(self.address, self._ask_all)

        @self._app.get("/metrics/targets")
        async def list_targets() -> list[dict[str, Any]]:
            return discovered(await siblings.addresses(), self.backend.listed_workers)

        self._task = asyncio.create_task(self._server.serve())
        await until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def list_workers(self, role: Role, *cards: WorkerCard) -> None:
        """Say that Serve runs exactly these workers of a role."""
        self.backend.set_workers(role, {card.replica_id: card for card in cards})

    async def stop(self) -> None:
        """Stop listening; again is harmless."""
        self._server.force_exit = self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=10)
        await self._metrics_server.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave pytest's signal handlers alone."""
        yield


class MonitoredSystem:
    """Everything; on one event loop."""

    prefill: list[Worker]
    decode: list[Worker]
    colocated: Worker

    def __init__(self, on_send: OnSend, on_received: OnReceived) -> None:
        self._model = tiny_model("llama")
        self._hooks = on_send, on_received
        self.ingresses = [Ingress(1, 30.0, self._ask_all), Ingress(2, 1e-5, self._ask_all)]
        self.senders = [
            FaultyTransport(GlooTransport("127.0.0.1"), on_send=on_send) for _ in range(2)
        ]
        self._receiver = FaultyTransport(GlooTransport("127.0.0.1"), on_received=on_received)
        self.others: list[Worker] = []  # started later; closed with the rest
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start workers and ingresses, and connect them."""
        chunks = EngineConfig(max_batch_tokens=_CHUNK_TOKENS)
        self.prefill = [
            await self.start_worker(Role.PREFILL, engine=chunks, transport=transport)
            for transport in self.senders
        ]
        self.decode = [
            await self.start_worker(Role.DECODE, transport=transport)
            for transport in (None, self._receiver)
        ]
        tight = EngineConfig(max_num_requests=16, max_waiting_requests=2000)
        self.colocated = await self.start_worker(Role.COLOCATED, engine=tight, num_blocks=48)
        self.proxies = [SessionProxy(worker.card.url) for worker in self.decode]
        self._proxied = [
            structs.replace(worker.card, url=await proxy.listen())
            for worker, proxy in zip(self.decode, self.proxies, strict=True)
        ]
        for ingress in self.ingresses:
            await ingress.start()
        for ingress in self.ingresses:
            ingress.list_workers(Role.PREFILL, *(worker.card for worker in self.prefill))
            ingress.list_workers(Role.COLOCATED, self.colocated.card)
        self.list_decode()
        await until(lambda: all(ingress.backend.is_ready()[0] for ingress in self.ingresses))

    async def _ask_all(self, timeout_seconds: float, method: str) -> list[Any]:
        assert method == "describe"
        return [msgspec.to_builtins(ingress.address) for ingress in self.ingresses]

    async def start_worker(self, role: Role, **options: Any) -> Worker:
        """Start one more worker, which nobody knows of yet."""
        return await start(role, self._model, handoff=_HANDOFF, **options)

    def list_decode(self, *more: Worker) -> None:
        """List the decode workers; others besides at the first ingress alone."""
        first, second = self.ingresses
        others = [worker.card for worker in more]
        first.list_workers(Role.DECODE, *self._proxied, *others)
        second.list_workers(Role.DECODE, *(worker.card for worker in self.decode))

    def load(self, session: aiohttp.ClientSession) -> None:
        """Send requests until ``close``: a few clients at each ingress, one after the other."""
        for number, ingress in enumerate(4 * self.ingresses):
            self.spawn(client(session, ingress.url, number))

    def spawn(self, work: Any) -> asyncio.Task[None]:
        """Run something until ``close``."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End everything."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for ingress in self.ingresses:
            await ingress.stop()
            await ingress.backend.close()
        for proxy in self.proxies:
            await proxy.close()
        for worker in (*self.prefill, *self.decode, self.colocated, *self.others):
            await worker.close()
        await until(lambda: not handoff_threads())


async def client(session: aiohttp.ClientSession, url: str, seed: int) -> None:
    """One request after the other; until it is cancelled."""
    rng = random.Random(seed)
    shared = [10] * _SHARED_TOKENS
    while True:
        prompt = shared + rng.choices(range(3, VOCAB_SIZE), k=_PROMPT_TOKENS - _SHARED_TOKENS)
        body = {"prompt": prompt, "max_tokens": _MAX_TOKENS, "ignore_eos": True}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await post(session, url, **body)
        await asyncio.sleep(0.02)


async def post(session: aiohttp.ClientSession, url: str, **body: Any) -> int:
    """One streamed completion, read to its end; returns the status."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    body = {"model": "tiny", "stream": True, **body}
    async with session.post(f"{url}/v1/completions", json=body, timeout=timeout) as answer:
        await answer.read()
        return answer.status


@contextlib.asynccontextmanager
async def monitored_system(
    on_send: OnSend, on_received: OnReceived
) -> AsyncIterator[MonitoredSystem]:
    """A running system for an ``async with`` block."""
    system = MonitoredSystem(on_send, on_received)
    await system.start()
    try:
        yield system
    finally:
        await system.close()
