"""The ingress tells decode workers which prefill workers there are, in whatever order they come."""

import asyncio

from pools import start, until
from tiny_models import tiny_model

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import Role


def test_links_are_prewarmed_whoever_comes_first() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        workers = [await start(role, model) for role in (Role.PREFILL, Role.DECODE, Role.PREFILL)]
        first, decode, second = workers
        roles = {Role.PREFILL, Role.DECODE}
        backend = ClusterBackend("tiny", RouterConfig(), roles, IngressMetrics())
        backend.set_workers(Role.PREFILL, {"p1": first.card})
        backend.set_workers(Role.DECODE, {"d": decode.card})
        counters = decode.generate.receiver.counters
        await until(lambda: counters().prewarmed_links == 1)
        backend.set_workers(Role.PREFILL, {"p1": first.card, "p2": second.card})
        await until(lambda: counters().prewarmed_links == 2)
        for closing in (backend, *workers):
            await closing.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
