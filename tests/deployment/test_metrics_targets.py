"""Service discovery: every process once, and none forgotten while it does not answer."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
from pools import start, until
from tiny_models import tiny_model

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.metrics_targets import IngressAddress, Siblings, discovered
from antiphon.messages import Role
from antiphon.workers.metrics_server import MetricsServer

OWN = IngressAddress("i0", "10.0.0.1", "10.0.0.1:1")
OTHER = IngressAddress("i1", "10.0.0.2", "10.0.0.2:2")


def ask(siblings: Siblings) -> set[str]:
    return {address.replica_id for address in asyncio.run(siblings.addresses())}


class Replicas:
    def __init__(self) -> None:
        self.answers: list[Any] = []

    async def __call__(self, seconds: float, method: str) -> Sequence[Any]:
        assert method == "describe"
        if not self.answers:
            raise RuntimeError("the deployment is unavailable")
        return [a if isinstance(a, Exception) else msgspec.to_builtins(a) for a in self.answers]


def test_siblings_that_do_not_answer_stay_and_those_that_are_gone_go() -> None:
    replicas = Replicas()
    siblings = Siblings(OWN, replicas)
    assert ask(siblings) == {"i0"}
    replicas.answers = [OTHER, OWN]
    assert ask(siblings) == {"i0", "i1"}
    replicas.answers = [RuntimeError("hangs"), OWN]
    assert ask(siblings) == {"i0", "i1"}
    replicas.answers = []
    assert ask(siblings) == {"i0", "i1"}
    replicas.answers = [OWN]
    assert ask(siblings) == {"i0"}


def test_an_ingress_of_another_version_hides_no_other() -> None:
    replicas = Replicas()
    replicas.answers = [{"replica_id": "i2"}, OTHER, OWN]
    assert ask(Siblings(OWN, replicas)) == {"i0", "i1"}


def test_an_ingress_takes_the_first_free_port_of_those_it_may_have() -> None:
    async def scenario() -> None:
        first, second = (MetricsServer(lambda: b"up 1\n") for _ in range(2))
        taken = await first.listen("127.0.0.1")
        ports = range(taken, taken + 50)
        found = await second.listen("127.0.0.1", ports)
        assert found in ports[1:]
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{found}/metrics")).text == "up 1\n"
        await first.close()
        await second.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_workers_are_targets_whether_connected_or_not_and_serve_their_metrics() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        worker, server = await start(Role.COLOCATED, model), MetricsServer(IngressMetrics().render)
        port = await server.listen("127.0.0.1")
        own = IngressAddress("i0", "127.0.0.1", f"127.0.0.1:{port}")
        roles = {Role.COLOCATED}
        backend = ClusterBackend("tiny", RouterConfig(), roles, IngressMetrics())
        gone = msgspec.structs.replace(
            worker.card, replica_id="gone", incarnation="x", url="ws://127.0.0.1:1/session"
        )
        cards = {card.replica_id: card for card in (worker.card, gone)}
        backend.set_workers(Role.COLOCATED, cards)
        await until(lambda: backend._view.get(worker.card.incarnation) is not None)
        targets = discovered([own], backend.listed_workers)
        labels = [target["labels"] for target in targets]
        assert sorted((one["pool"], one["worker"]) for one in labels) == [
            ("colocated", worker.card.replica_id), ("colocated", "gone"), ("ingress", "i0"),
        ]  # fmt: skip
        async with httpx.AsyncClient() as client:
            for target in targets:
                (host_port,) = target["targets"]
                if target["labels"]["worker"] != "gone":
                    answer = await client.get(f"http://{host_port}/metrics")
                    assert f'role="{target["labels"]["pool"]}"' in answer.text
        await backend.close()
        await worker.close()
        await server.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_worker_that_drains_is_scraped_until_it_is_gone() -> None:
    """Serve lists it no more from the moment that it is told to stop."""

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, tiny_model("llama"))
        backend = ClusterBackend("tiny", RouterConfig(), {Role.COLOCATED}, IngressMetrics())
        backend.set_workers(Role.COLOCATED, {worker.card.replica_id: worker.card})
        await until(lambda: backend.is_ready()[0])
        await worker.drain(0.0)
        backend.set_workers(Role.COLOCATED, {})
        (target,) = discovered([], backend.listed_workers)
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{target['targets'][0]}/metrics")
        assert 'antiphon_draining{role="colocated"} 1.0' in answer.text
        assert not backend.is_ready()[0]
        await worker.close()
        await until(lambda: not discovered([], backend.listed_workers))
        await backend.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
