"""The Serve application: an ingress over pools of workers.

    antiphon config serve pools.yaml > serve.yaml
    serve run serve.yaml        (import_path: antiphon.deployment.application:app, args: ...)
    serve deploy serve.yaml

Serve owns the replicas: placement, health, restarts, scaling, updates. It does not carry requests
to the workers: an ingress finds them through ``record_replica_metadata`` and talks to them
directly, over one session each (docs/design.md says why).
"""

import asyncio
import logging
import os
import time
from typing import Any

import ray
from pydantic import BaseModel, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from antiphon.config import AntiphonConfig, PoolConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.pod_readiness import PodReadiness
from antiphon.deployment.serve_document import INGRESS_NAME
from antiphon.messages import Role
from antiphon.router.discovery import pack_card
from antiphon.router.serve_discovery import ROUTER_CLASS
from antiphon.tracing import effective

logger = logging.getLogger(__name__)

_HEALTH_PERIOD_SECONDS = 5.0
# Requests reach workers over sessions, so Serve sees none of them as ongoing: a worker that is to
# stop drains itself, and Serve forces it after this much more. Handing over takes up to 5 s if a
# transfer does not let go, closing sessions 3 s, and a step on a CPU a second or two.
_STOP_MARGIN_SECONDS = 15.0


class WorkerReplica:
    """One worker in a Serve replica."""

    # Serve awaits constructors, so that loading a model does not block its control calls.
    async def __init__(self, role: str, config: dict[str, Any]) -> None:  # type: ignore[misc]
        began_at = time.monotonic()
        # Spinning OpenMP threads starve whatever shares the cores; must be set before torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        configure_logging()
        self._readiness = PodReadiness(os.environ)
        self._readiness.loading()
        from antiphon.workers.model_source import resolve_model
        from antiphon.workers.start import start_worker
        from antiphon.workers.worker_settings import WorkerSettings

        parsed = AntiphonConfig.model_validate(config)
        folder = await asyncio.to_thread(resolve_model, parsed.model.source, logger.info)
        settings = WorkerSettings(
            role=Role(role),
            replica_id=serve.get_replica_context().replica_id.unique_id,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            model_folder=folder,
            model=parsed.model,
            engine=parsed.pools[role].engine,
            handoff=parsed.handoff,
            num_gpus=parsed.pools[role].num_gpus,
            target_itl_seconds=parsed.router.target_itl_seconds,
            silence_seconds=parsed.router.silence_seconds,
            vllm_names=parsed.metrics.vllm_names,
            ports=parsed.metrics.ports,
            tracing=effective(parsed.tracing, os.environ),
            began_at=began_at,
        )
        self._drain_seconds = parsed.pools[role].drain_seconds
        self.worker = await start_worker(settings)
        self._readiness.serving()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tell every ingress who this worker is."""
        return pack_card(self.worker.card)

    async def check_health(self) -> None:
        """Raise if the worker should be replaced."""
        if not self.worker.is_healthy:
            raise RuntimeError("the engine has stopped or its steps fail")

    async def __del__(self) -> None:
        """Finish what is here, hand over the rest, then stop; called once by Serve at shutdown."""
        worker = getattr(self, "worker", None)
        if worker is not None:
            self._readiness.leaving()
            await worker.drain(self._drain_seconds)
            await worker.close()


@serve.ingress()
class Ingress:
    """The HTTP endpoint in a Serve replica."""

    def __init__(self, config: dict[str, Any], pools: dict[str, DeploymentHandle[Any]]) -> None:
        configure_logging()
        self._config = AntiphonConfig.model_validate(config)
        self._pools = pools

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application on the replica, where tokenizer and sessions live."""
        from antiphon.deployment.ingress import IngressProcess, Placement

        context = serve.get_replica_context()

        async def ask_ingresses(seconds: float, method: str, *arguments: str) -> list[Any]:
            handle = serve.get_deployment_handle(context.deployment, context.app_name)
            asking = handle.broadcast(method, *arguments)
            answers: list[Any] = await asking.results_async(
                timeout_s=seconds, return_exceptions=True
            )
            return answers

        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        placement = Placement(context.replica_id.unique_id, host, ask_ingresses)
        self._process = IngressProcess(self._config, self._pools, placement)
        return self._process.app

    async def describe(self) -> dict[str, Any]:
        """Tell another ingress where this one is scraped."""
        return self._process.describe()

    async def find_requests(self, request_id: str) -> list[dict[str, Any]]:
        """Tell another ingress what this one knows of a request."""
        return self._process.find_requests(request_id)

    async def stop_taking(self, timeout_seconds: float) -> None:
        """Refuse new requests with 503; open ones have so long to finish, then they get an error.

        For whoever stops the application, before that: a replica that Serve stops is not told.
        """
        await self._process.backend.stop_taking(timeout_seconds)

    async def list_workers(self) -> list[dict[str, Any]]:
        """Who is connected, for callers inside the cluster: they need no API key."""
        return self._process.backend.describe_workers()


class AppArguments(AntiphonConfig):
    """The configuration as Serve passes it; a bad one is explained in our words."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler["AppArguments"]) -> Any:
        if isinstance(data, BaseModel):
            data = data.model_dump()
        return handler(parse_config(data, "application arguments").model_dump())


def app(args: AppArguments) -> serve.Application:
    """Build the application from its configuration; ``deployments`` of Serve's file go over it."""
    config = args.model_dump(mode="json")
    pools = {
        role: _pool_deployment(role, pool).bind(role, config) for role, pool in args.pools.items()
    }
    make_ingress = serve.deployment(
        name=INGRESS_NAME,
        num_replicas=args.http.ingress_replicas,
        # The application bounds itself, with an answer in OpenAI's shape.
        max_ongoing_requests=4 * args.http.max_concurrent_requests,
        ray_actor_options={"num_cpus": 0, "resources": args.http.resources},
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        max_surge_percent=100,  # it needs no CPU of its own, and requests need one that runs
        # Serve waits for open HTTP requests, whose streams pass through its proxy.
        graceful_shutdown_timeout_s=args.http.drain_seconds + _STOP_MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return make_ingress(Ingress).bind(config, pools)


def configure_logging() -> None:
    """Let this package's log reach the replica's log file, which Serve keeps for its own logger."""
    ours = logging.getLogger("antiphon")
    ours.setLevel(logging.INFO)
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.propagate = False


def _pool_deployment(role: str, pool: PoolConfig) -> serve.Deployment:
    make_pool = serve.deployment(
        name=role,
        num_replicas=pool.replicas,
        ray_actor_options={
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": pool.resources,
        },
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": ROUTER_CLASS}
        ),
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=pool.drain_seconds + _STOP_MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=pool.max_surge_percent,
    )
    return make_pool(WorkerReplica)
