"""A real Ray Serve: cards reach the driver and an ingress replica, and follow a killed worker."""

import os
import signal
import threading
import time
import uuid
import warnings

import pytest

from antiphon.messages import Role, WorkerCard
from antiphon.router.discovery import pack_card

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from antiphon.router.serve_discovery import ROUTER_CLASS, WorkerWatch

pytestmark = pytest.mark.e2e


class Cards:
    """The last cards a watch delivered, and a way to wait for others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.cards: dict[str, WorkerCard] = {}
        self.threads: set[int] = set()

    def __call__(self, cards) -> None:
        with self._changed:
            self.cards = dict(cards)
            self.threads.add(threading.get_ident())
            self._changed.notify_all()

    def wait_until(self, predicate, timeout_seconds: float = 60.0) -> dict[str, WorkerCard]:
        with self._changed:
            assert self._changed.wait_for(lambda: predicate(self.cards), timeout_seconds), (
                f"still {sorted(self.cards)} after {timeout_seconds} s"
            )
            return self.cards


def build_app():
    # Inside a function, so that Ray pickles the classes by value: its workers can't import tests.
    @serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER_CLASS),
    )
    class Worker:
        def __init__(self):
            self._card = WorkerCard(
                replica_id=serve.get_replica_context().replica_id.unique_id,
                incarnation=uuid.uuid4().hex,
                role=Role.DECODE,
                url="ws://127.0.0.1:1/session",
                model_fingerprint="none",
                block_size=16,
                num_blocks=64,
                max_context_tokens=1024,
                kv_bytes_per_token=2,
                wire_bytes_per_token=2,
                pid=os.getpid(),
                node="here",
            )

        def record_replica_metadata(self):
            return pack_card(self._card)

        def incarnation(self):
            return self._card.incarnation

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Ingress:
        def __init__(self, workers):
            self._cards = {}
            self._watch = WorkerWatch(workers, self._learn)

        def _learn(self, cards):
            self._cards = dict(cards)

        async def incarnations(self):
            return sorted(card.incarnation for card in self._cards.values())

    return Ingress.bind(Worker.bind())


@pytest.fixture
def ingress(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray puts the driver's directory on every worker's path
    ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        serve.start(proxy_location="Disabled")  # no HTTP here, so no port to collide on
        yield serve.run(build_app(), name="app", route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_for_ingress(ingress, expected: list[str], timeout_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while (seen := ingress.incarnations.remote().result(timeout_s=30)) != expected:
        assert time.monotonic() < deadline, f"the ingress still sees {seen}"
        time.sleep(0.02)


def wait_for_wanted(watch: WorkerWatch, expected: int, timeout_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while watch.num_wanted != expected:
        assert time.monotonic() < deadline, f"Serve wants {watch.num_wanted}"
        time.sleep(0.02)


def incarnations(cards: dict[str, WorkerCard]) -> list[str]:
    return sorted(card.incarnation for card in cards.values())


def test_cards_are_learned_and_follow_a_killed_replica(ingress):
    cards = Cards()
    started_at = time.monotonic()
    # The watch alone holds this handle, as it has to.
    watch = WorkerWatch(serve.get_deployment_handle("Worker", "app"), cards)
    first = cards.wait_until(lambda now: len(now) == 2)
    print(f"both cards after {time.monotonic() - started_at:.3f} s")
    assert all(card.replica_id == replica_id for replica_id, card in first.items())
    assert len(set(incarnations(first))) == 2
    wait_for_ingress(ingress, incarnations(first))
    assert threading.get_ident() not in cards.threads
    wait_for_wanted(watch, 2)

    killed, survivor = first.values()
    killed_at = time.monotonic()
    os.kill(killed.pid, signal.SIGKILL)
    cards.wait_until(lambda now: killed.replica_id not in now)
    print(f"gone after {time.monotonic() - killed_at:.3f} s")
    second = cards.wait_until(lambda now: len(now) == 2)
    print(f"replaced after {time.monotonic() - killed_at:.3f} s")
    assert survivor in second.values()
    assert killed.incarnation not in incarnations(second)
    wait_for_ingress(ingress, incarnations(second))

    # The router also routes: a call reaches one of the replicas that were announced.
    workers = serve.get_deployment_handle("Worker", "app")
    answers = [workers.incarnation.remote() for _ in range(8)]
    assert {answer.result(timeout_s=30) for answer in answers} <= set(incarnations(second))
    assert watch.num_wanted == 2
    watch.close()
    assert watch.num_wanted is None
