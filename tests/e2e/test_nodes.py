"""Pools on nodes of a network: parts of it are cut off, nodes are lost, and the head restarts.

Ray's cluster utilities start each node in a network namespace of its own (``node_cluster``). Each
test finds the cluster whole. Clients compare every answer with transformers' own and are never let
down, but for those whose answer came through a node that is lost or cut off.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import network
import pytest
from http_load import HttpLoad, Question, questions
from node_cluster import NodeCluster, Rebuilt, metric
from processes import wait_for
from tiny_folder import save_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.nodes, pytest.mark.timeout(300)]
HEARTBEAT_SECONDS = 7.5  # after which a session with a peer that is silent is given up
KEEPALIVE_SECONDS = 10.0  # after which a proxy gives up an ingress, as the cluster file sets it
ROUND = 12  # answers that show that all is well
SLACK_SECONDS = 8.0  # for the answer itself, on a machine that also starts Ray's nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", smollm2_path)


@pytest.fixture(scope="module")
def asked(model: Path) -> list[Question]:
    return questions(model, 36)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Rebuilt]:
    if (reason := network.why_not()) is not None:
        pytest.skip(reason)
    made = Rebuilt(tmp_path_factory.mktemp("nodes"), model)
    yield made
    made.close()


@pytest.fixture
def cluster(rebuilt: Rebuilt, request: pytest.FixtureRequest) -> NodeCluster:
    return rebuilt.get(request.session.testsfailed)


def test_each_worker_is_reached_at_the_address_of_its_node(
    cluster: NodeCluster, asked: list[Question]
) -> None:
    """Each node has another interface with the default route, which is not the one to use."""
    workers = cluster.workers()
    assert workers.keys() == {"p1", "p2", "d1", "d2"}
    for name, worker in workers.items():
        assert worker["url"].startswith(f"ws://{cluster.network.address_of(name)}:")
        assert worker["role"] == {"p": "prefill", "d": "decode"}[name[0]]

    def transfers() -> dict[str, float]:
        name = "antiphon_handoff_transfers_total"
        return {each: metric(worker, name) for each, worker in workers.items()}

    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        wait_for(lambda: all(transfers().values()), 30, lambda: f"{transfers()}; {load.seen()}")
        load.more(ROUND)
    assert not load.problems
    for worker in workers.values():
        assert metric(worker, "antiphon_handoff_links") == 2


def test_a_partition_between_the_pools_is_answered_around_and_forgotten(
    cluster: NodeCluster, asked: list[Question]
) -> None:
    """Packets between one decode node and both prefill nodes vanish; all others pass.

    Whatever the router chooses for that decode worker has to cross the cut. So has what a proxy of
    a prefill node has sent to the ingress there: after a while those clients get an error, or an
    answer from the other ingress.
    """
    workers = cluster.workers()
    decode = workers["d1"]

    def attempts(**labels: str) -> float:
        return metric(decode, "antiphon_prefill_attempts_total", **labels)

    def failed() -> float:
        return attempts() - attempts(outcome="complete")

    def fallbacks() -> float:
        return metric(decode, "antiphon_prefill_fallbacks_total")

    def links() -> dict[str, float]:
        return {name: metric(each, "antiphon_handoff_links") for name, each in workers.items()}

    def seen() -> str:
        counted = f"{failed()} attempts failed, {fallbacks()} fallbacks, links {links()}"
        return f"{counted}; {load.seen()}; across the cut: {crossing.seen()}"

    with (
        HttpLoad([cluster.url("d2")], asked) as load,
        HttpLoad([cluster.url("p2")], asked, num_clients=2) as crossing,
    ):
        before = failed(), fallbacks()
        cluster.network.part("d1", "p1", "p2")
        wait_for(lambda: failed() > before[0] and fallbacks() > before[1], 30, seen)
        wait_for(lambda: links() == {"p1": 1, "p2": 1, "d1": 0, "d2": 2}, 30, seen)
        load.more(ROUND)
        wait_for(lambda: crossing.slowest_seconds > KEEPALIVE_SECONDS / 2, 30, seen)
        cluster.network.heal("d1", "p1", "p2")
        # At most 30 s shunned, and only a request that is sent there makes the link anew.
        wait_for(lambda: set(links().values()) == {2}, 60, seen)
        load.more(ROUND)
        crossing.more(ROUND)
    assert not load.problems
    assert load.slowest_seconds < HEARTBEAT_SECONDS + SLACK_SECONDS
    assert crossing.slowest_seconds < KEEPALIVE_SECONDS + SLACK_SECONDS


def test_lost_nodes_cost_a_pause_and_come_back(cluster: NodeCluster, asked: list[Question]) -> None:
    """One is switched off; of the other, all packets vanish."""
    with HttpLoad([cluster.url("d1")], asked) as load:
        cluster.order("kill", "p2")
        load.more(ROUND)
        cluster.network.isolate("d2")
        wait_for(lambda: "d2" not in cluster.workers(), 60, lambda: cluster.seen("d1"))
        load.more(ROUND)
        cluster.order("kill", "d2")
        cluster.network.rejoin("d2")
        cluster.order("start", "p2", "d2")
        cluster.wait_whole()
        load.more(ROUND)
    assert not load.problems
    assert load.slowest_seconds < HEARTBEAT_SECONDS + SLACK_SECONDS


def test_everything_serves_while_the_head_is_gone_and_serve_recovers(
    cluster: NodeCluster, asked: list[Question]
) -> None:
    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        victim = cluster.workers()["p1"]
        cluster.order("kill", "head")
        assert not cluster.is_ready("head")
        load.more(ROUND)
        os.kill(victim["pid"], signal.SIGKILL)  # nobody can replace it now
        load.more(ROUND)
        cluster.order("start", "head")
        # Serve knows its replicas again, replaces the one that died, and the ingress hears of it.
        wait_for(
            lambda: cluster.workers().get("p1", victim)["pid"] != victim["pid"],
            60,
            lambda: f"killed: {victim}; {cluster.seen('d1')}",
        )
        load.more(ROUND)
    assert not load.problems
    cluster.wait_whole()


def test_a_rolling_update_of_pools_and_ingress_fails_no_request(
    cluster: NodeCluster, asked: list[Question]
) -> None:
    before = {worker["incarnation"] for worker in cluster.workers().values()}
    ingresses_before = cluster.ingresses()
    assert len(ingresses_before) == 2
    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        cluster.deploy(max_batch_tokens=48)
        cluster.wait_whole()
        load.more(ROUND)
    assert not load.problems
    after = {worker["incarnation"] for worker in cluster.workers().values()}
    assert not before & after
    wait_for(
        lambda: len(cluster.ingresses()) == 2 and not cluster.ingresses() & ingresses_before,
        30,
        lambda: f"{cluster.ingresses()} after {ingresses_before}",
    )
