"""A prefill and a decode worker in this process, and a session, a backend and HTTP to ask them."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx
from memory_transport import FaultPlan, MemoryNetwork, MemoryTransport
from pools import Client, start, until
from scripted_backend import CharTokenizer

from antiphon.config import EngineConfig, HandoffConfig, RouterConfig, TracingConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_app import create_app
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal
from antiphon.messages import Role, SamplingParams
from antiphon.workers.batch import Batch
from antiphon.workers.worker import Worker

CHUNK_TOKENS = 16
SLOW_STEP_SECONDS = 0.02


async def pair(
    model: Any,
    plan: FaultPlan | None = None,
    num_blocks: int = 64,
    tracing: TracingConfig | None = None,
    handoff: HandoffConfig | None = None,
    **engine: Any,
) -> tuple[Worker, Worker, Client]:
    """A prefill worker that computes chunk by chunk, a decode worker, and a client of that one."""
    network = MemoryNetwork()
    prefill = await start(
        Role.PREFILL,
        model,
        engine=EngineConfig(max_batch_tokens=CHUNK_TOKENS, **engine),
        handoff=handoff,
        transport=MemoryTransport(network, "p", plan),
        tracing=tracing,
    )
    decode = await start(
        Role.DECODE,
        model,
        engine=EngineConfig(**engine),
        num_blocks=num_blocks,
        handoff=handoff,
        transport=MemoryTransport(network, "d"),
        tracing=tracing,
    )
    return prefill, decode, await Client.connect(decode)


async def backend_over(*workers: Worker) -> ClusterBackend:
    """An ingress's backend that is connected to these workers and does not wait for others."""
    config = RouterConfig(local_prefill_max_tokens=0, replay_wait_seconds=0)
    roles = {worker.card.role for worker in workers}
    backend = ClusterBackend("tiny", config, roles, IngressMetrics())
    for role in roles:
        cards = [worker.card for worker in workers if worker.card.role is role]
        backend.set_workers(role, {card.replica_id: card for card in cards})
    await until(lambda: all(backend._view.get(w.card.incarnation) for w in workers))
    return backend


async def close(*closing: Any) -> None:
    for one in closing:
        await one.close()


def http_client(backend: ClusterBackend, journal: Journal | None = None) -> httpx.AsyncClient:
    app = create_app(backend, CharTokenizer(), max_concurrent_requests=16, journal=journal)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def fail_step(number: int) -> Callable[[Batch], None]:
    """For ``watch``: every step from this one on fails."""
    steps = iter(range(1_000_000))

    def on_step(batch: Batch) -> None:
        if next(steps) >= number:
            raise RuntimeError("out of memory")

    return on_step


async def generate(backend: ClusterBackend, prompt: list[int]) -> list[int]:
    """Ask for eight greedy tokens; a caller that is cancelled has gone away."""
    tokens: list[int] = []
    sampling = SamplingParams(8, temperature=0)
    async with aclosing(backend.generate("r", prompt, sampling)) as outputs:
        async for output in outputs:
            tokens += output.token_ids
    return tokens
