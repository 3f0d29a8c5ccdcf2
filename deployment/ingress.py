"""One ingress process: tokenizer, backend and HTTP application, joined.

Beside OpenAI's routes it answers ``/metrics`` for Prometheus and ``/workers``: what runs where.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from antiphon.config import AntiphonConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_app import create_app
from antiphon.messages import Role, WorkerCard
from antiphon.metrics import Metrics
from antiphon.router.serve_discovery import WorkerWatch
from antiphon.workers.model_source import resolve_model
from antiphon.workers.tokenizer import Tokenizer

StopTaking = Callable[[float], Awaitable[None]]


def build_ingress(
    config: AntiphonConfig, pools: Mapping[str, DeploymentHandle[Any]]
) -> tuple[StopTaking, FastAPI]:
    """Make the application of one ingress replica, and the function that closes it to requests.

    Args:
        config: Of the deployment.
        pools: A handle for each pool of workers, by role.
    """
    metrics = Metrics("ingress")
    roles = {Role(role) for role in pools}
    backend = ClusterBackend(config.model.name, config.router, roles, metrics)
    tokenizer = Tokenizer(resolve_model(config.model.source))
    app = create_app(
        backend, tokenizer, max_concurrent_requests=config.http.max_concurrent_requests
    )

    @app.get("/metrics", include_in_schema=False)
    async def serve_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/workers", include_in_schema=False)
    async def list_workers() -> list[dict[str, Any]]:
        return backend.describe_workers()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watches = [_watch(backend, Role(role), handle) for role, handle in pools.items()]
        yield
        for watch in watches:
            watch.close()
        await backend.close()

    app.router.lifespan_context = lifespan
    return backend.stop_taking, app


def _watch(backend: ClusterBackend, role: Role, handle: DeploymentHandle[Any]) -> WorkerWatch:
    loop = asyncio.get_running_loop()

    def on_cards(cards: Mapping[str, WorkerCard]) -> None:
        loop.call_soon_threadsafe(backend.set_workers, role, dict(cards))

    return WorkerWatch(handle, on_cards)
