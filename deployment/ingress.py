"""One ingress process: tokenizer, backend and HTTP application, joined.

Beside OpenAI's routes it answers ``/metrics`` and ``/metrics/targets`` for Prometheus,
``/workers``: what runs where, and ``/requests/{request_id}``: where a request's time went.
"""

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from antiphon.config import AntiphonConfig, HttpConfig
from antiphon.deployment.api_keys import ApiKeys
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.cluster_metrics import worker_states
from antiphon.deployment.http_app import Guard, create_app
from antiphon.deployment.http_auth import ApiKeyMiddleware
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal
from antiphon.deployment.metrics_targets import AskAll, IngressAddress, Siblings, discovered
from antiphon.deployment.request_search import add_request_route
from antiphon.messages import Role, WorkerCard
from antiphon.router.serve_discovery import WorkerWatch
from antiphon.tracing import effective, start_tracing
from antiphon.vllm_names import VllmCollector
from antiphon.workers.metrics_server import MetricsServer
from antiphon.workers.model_files import fingerprint
from antiphon.workers.model_source import resolve_model
from antiphon.workers.tokenizer import Tokenizer

_MEET_SECONDS = 3.0
_OTHER_MODEL_SECONDS = 600.0  # a large model loads for minutes
_MEET_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ingress replica this is."""

    replica_id: str
    host: str  # the address that other nodes reach this one at
    ask_ingresses: AskAll  # calls a method of all of them


class IngressProcess:
    """What one ingress replica runs.

    Args:
        config: Of the deployment.
        pools: A handle for each pool of workers, by role.
        placement: Of this replica.

    Raises:
        ConfigError: The file of API keys cannot be used.
    """

    def __init__(
        self,
        config: AntiphonConfig,
        pools: Mapping[str, DeploymentHandle[Any]],
        placement: Placement,
    ) -> None:
        self._pools = pools
        self._placement = placement
        self._address: IngressAddress | None = None
        metrics = IngressMetrics(config.router)
        roles = {Role(role) for role in pools}
        self.backend = ClusterBackend(config.model.name, config.router, roles, metrics)
        if config.metrics.vllm_names:
            view = self.backend.view
            states = VllmCollector(config.model.name, lambda: worker_states(view))
            metrics.registry.register(states)
        self._metrics = metrics
        tracing = effective(config.tracing, os.environ)
        replica_id = placement.replica_id
        self._tracing = start_tracing(tracing, metrics.role, replica_id, metrics)
        self._journal = Journal(self._tracing, replica_id, tracing.kept_timelines)
        self._server = MetricsServer(metrics.render)
        self._ports = config.metrics.ports
        self._model_folder = resolve_model(config.model.source)
        self.app = self._make_app(config)

    def describe(self) -> dict[str, Any]:
        """Where this ingress is scraped, for the others.

        Raises:
            RuntimeError: It has not started yet.
        """
        if self._address is None:
            raise RuntimeError("this ingress has not started yet")
        described: dict[str, Any] = msgspec.to_builtins(self._address)
        return described

    def find_requests(self, request_id: str) -> list[dict[str, Any]]:
        """What this ingress knows of a request, for the others."""
        found: list[dict[str, Any]] = msgspec.to_builtins(self._journal.find(request_id))
        return found

    def _make_app(self, config: AntiphonConfig) -> FastAPI:
        app = create_app(
            self.backend,
            Tokenizer(self._model_folder),
            max_concurrent_requests=config.http.max_concurrent_requests,
            metrics=self._metrics,
            journal=self._journal,
            guard=_guard(config.http, self._metrics),
            server_returns_ids=True,
        )

        @app.get("/metrics", include_in_schema=False)
        async def serve_metrics() -> Response:
            return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

        @app.get("/metrics/targets", include_in_schema=False)
        async def list_targets() -> list[dict[str, Any]]:
            return discovered(await self._siblings.addresses(), self.backend.listed_workers)

        @app.get("/workers", include_in_schema=False)
        async def list_workers() -> list[dict[str, Any]]:
            return self.backend.describe_workers()

        add_request_route(app, self._placement.ask_ingresses, self._journal)
        app.router.lifespan_context = self._lifespan
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        replica_id, host = self._placement.replica_id, self._placement.host
        port = await self._server.listen(host, self._ports)
        self._address = IngressAddress(replica_id, host, f"{host}:{port}")
        self._siblings = Siblings(self._address, self._placement.ask_ingresses)
        # Reads 64 pieces of each weights file, which may lie on a volume far away.
        model_fingerprint = await asyncio.to_thread(fingerprint, self._model_folder)
        self.backend.sessions.model_fingerprint = model_fingerprint
        watches = {Role(r): _watch(self.backend, Role(r), pool) for r, pool in self._pools.items()}
        self.backend.count_wanted(
            lambda: {role: n for role, w in watches.items() if (n := w.num_wanted) is not None}
        )
        await _meet_workers(self.backend)
        yield
        for watch in watches.values():
            watch.close()
        await self.backend.close()
        await self._server.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


async def _meet_workers(backend: ClusterBackend) -> None:
    """Give sessions a moment: once this replica has started, Serve sends it requests.

    Where the workers run, as in an update, that takes less than a second. Where everything starts,
    the ingress is there first, and ``/ready`` says so. In an update of the model the ingresses of
    before go on with the workers of before until this one has started: so that waits for its own.
    """
    began_at = time.monotonic()
    while not backend.is_ready()[0]:
        others_serve = any(card.role is not Role.PREFILL for card in backend.sessions.others)
        limit = _OTHER_MODEL_SECONDS if others_serve else _MEET_SECONDS
        if time.monotonic() - began_at >= limit:
            break
        await asyncio.sleep(_MEET_POLL_SECONDS)


def _guard(http: HttpConfig, metrics: IngressMetrics) -> Guard | None:
    if http.api_key_file is None:
        return None
    keys = ApiKeys(Path(http.api_key_file), metrics)
    return functools.partial(ApiKeyMiddleware, keys=keys, metrics_need_key=http.metrics_need_key)


def _watch(backend: ClusterBackend, role: Role, handle: DeploymentHandle[Any]) -> WorkerWatch:
    loop = asyncio.get_running_loop()

    def on_cards(cards: Mapping[str, WorkerCard]) -> None:
        loop.call_soon_threadsafe(backend.set_workers, role, dict(cards))

    return WorkerWatch(handle, on_cards)
