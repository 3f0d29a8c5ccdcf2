"""Pools on nodes of a network: parts of it are cut off, nodes are lost, and the head restarts.

Ray's cluster utilities start each node in a network namespace of its own, with the environment that
deployment/ray-cluster.yaml gives real machines. One cluster for all tests, which leave it whole.
Clients compare every answer with transformers' own and are never let down, but for those whose
answer came through the node that is lost.
"""

import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import pytest
import ray_nodes
import yaml
from http_load import HttpLoad, Question, questions
from network import Network
from processes import Product, sum_of, wait_for
from tiny_folder import save_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.nodes, pytest.mark.timeout(300)]
CLUSTER_FILE = Path(__file__).parents[2] / "deployment/ray-cluster.yaml"
NODES = ["head", "p1", "p2", "d1", "d2"]
PORT = 8000
HEARTBEAT_SECONDS = 7.5  # after which a session with a peer that is silent is given up
SLACK_SECONDS = 8.0  # for the answer itself, on a machine that also starts Ray's nodes
# Ray's defaults take a minute to declare a node dead whose packets vanish.
QUICK = {"period_ms": "1000", "timeout_ms": "2000", "initial_delay_ms": "1000"}


def shipped_environment(gcs_folder: Path) -> dict[str, str]:
    """What deployment/ray-cluster.yaml sets for Ray on the head, and so on all nodes here."""
    head = " ".join(yaml.safe_load(CLUSTER_FILE.read_text())["head_start_ray_commands"])
    found = dict(re.findall(r"(RAY_\w+)=(\S+)", head))
    found["RAY_gcs_storage_path"] = str(gcs_folder)
    return found


@dataclass
class Cluster:
    """Five nodes, one worker on each but the head, and what plays the platform team."""

    network: Network
    nodes: Product
    folder: Path
    model: Path

    def order(self, what: str, name: str) -> None:
        """Kill or start a node, and wait until that is done."""
        line = f"{what} {NODES.index(name)}"
        num_before = self.nodes.log.read_text().count(line)
        assert self.nodes.process.stdin is not None
        self.nodes.process.stdin.write(f"{line}\n".encode())
        self.nodes.process.stdin.flush()
        log = self.nodes.log
        wait_for(lambda: log.read_text().count(line) > num_before, 60, log.read_text)

    def deploy(self, **engine: int) -> Product:
        """Deploy the application, or update it, with a program that then leaves."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config(self.model, engine)))
        address = f"{self.network.address_of('head')}:6379"
        script = Path(network.__file__).with_name("deploy_on.py")
        namespace = self.network.namespace("head")
        command = ["python", str(script), namespace, address, str(self.folder / "config.yaml")]
        return Product(command, PORT, self.folder)

    def at(self, name: str) -> Product:
        """The nodes' processes, as seen through the HTTP proxy of one node."""
        self.nodes.url = self.url(name)
        return self.nodes

    def url(self, name: str) -> str:
        return f"http://{self.network.address_of(name)}:{PORT}"

    def workers(self, through: str = "d1") -> dict[str, dict[str, Any]]:
        """By name of their node."""
        names = {self.network.address_of(name): name for name in NODES}
        return {names[worker["node"]]: worker for worker in self.at(through).get("/workers")}

    def wait_whole(self, through: str = "d1") -> None:
        wait_for(lambda: len(self.workers(through)) == 4, 90, lambda: str(self.workers(through)))


def config(model: Path, engine: dict[str, int]) -> dict[str, Any]:
    engine = {"kv_cache_bytes": 2 << 20, "max_batch_tokens": 64, **engine}
    pool = {"replicas": 2, "num_cpus": 0.5, "drain_seconds": 2, "engine": engine}
    return {
        "model": {"source": str(model), "served_name": "tiny"},
        "prefill": {**pool, "resources": {"antiphon_prefill": 1}},
        "decode": {**pool, "resources": {"antiphon_decode": 1}},
        "http": {
            "host": "0.0.0.0",
            "port": PORT,
            "drain_seconds": 20,
            "ingress_replicas": 2,
            "resources": {"antiphon_ingress": 0.001},
        },
        "router": {"local_prefill_max_tokens": 0, "replay_wait_seconds": 60},
    }


def node_options(made: Network, name: str) -> dict[str, Any]:
    options = {
        "namespace": made.namespace(name),
        "node_ip_address": made.address_of(name),
        "num_cpus": 1,
        "include_dashboard": False,
    }
    if name == "head":
        return {**options, "num_cpus": 0, "gcs_server_port": 6379}
    pool = {"p": "antiphon_prefill", "d": "antiphon_decode"}[name[0]]
    places = {pool: 1} if name[0] == "p" else {pool: 1, "antiphon_ingress": 1}
    return {**options, "resources": places}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    if (reason := network.why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nodes")
    model = save_tiny_model(folder / "tiny", smollm2_path)
    # Ray's sockets are in it, whose paths may not be long; and no other Ray here must find it.
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch, network.network(NODES) as made:
        environment = shipped_environment(folder / "gcs")
        environment |= {f"RAY_health_check_{key}": value for key, value in QUICK.items()}
        environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": str(ray_folder)}
        for key, value in environment.items():
            patch.setenv(key, value)
        options = json.dumps([node_options(made, name) for name in NODES])
        nodes = Product(["python", ray_nodes.__file__, options], PORT, folder)
        try:
            log = nodes.log.read_text
            wait_for(lambda: bool(ray_nodes.read_address(log())), 90, log)
            opened = Cluster(made, nodes, folder / "deploy", model)
            opened.folder.mkdir()
            finish(opened.deploy())
            opened.wait_whole()
            yield opened
        finally:
            nodes.stop()
            shutil.rmtree(ray_folder, ignore_errors=True)


def finish(deployment: Product) -> None:
    assert deployment.process.wait(120) == 0, deployment.log.read_text()
    deployment.stop()


@pytest.fixture(scope="module")
def asked(cluster: Cluster) -> list[Question]:
    return questions(cluster.model, 36)


def metric(worker: dict[str, Any], name: str, **labels: str) -> float:
    """Sum of a worker's own samples."""
    host = worker["url"].removeprefix("ws://").partition("/")[0]
    with urllib.request.urlopen(f"http://{host}/metrics", timeout=30) as answer:
        return sum_of(answer.read().decode(), name, labels)


def test_each_worker_is_reached_at_the_address_of_its_node(
    cluster: Cluster, asked: list[Question]
) -> None:
    """Each node has another interface with the default route, which is not the one to use."""
    workers = cluster.workers()
    assert workers.keys() == {"p1", "p2", "d1", "d2"}
    for name, worker in workers.items():
        assert worker["url"].startswith(f"ws://{cluster.network.address_of(name)}:")
        assert worker["role"] == {"p": "prefill", "d": "decode"}[name[0]]
    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        load.more(len(asked))
    assert not load.problems
    for name, worker in cluster.workers().items():
        assert metric(worker, "antiphon_handoff_transfers_total"), f"nothing crossed at {name}"
        assert metric(worker, "antiphon_handoff_links") == 2


def test_a_partition_between_a_pair_is_answered_around_and_forgotten(
    cluster: Cluster, asked: list[Question]
) -> None:
    """Packets between one prefill and one decode node vanish; both still reach all others."""
    prefill, decode = (cluster.workers()[name] for name in ("p1", "d1"))

    def failed() -> float:
        name = "antiphon_prefill_attempts_total"
        return metric(decode, name) - metric(decode, name, outcome="complete")

    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        before = failed()
        cluster.network.part("p1", "d1")
        wait_for(lambda: metric(decode, "antiphon_handoff_links") == 1, 30)
        load.more(len(asked))
        assert failed() > before
        cluster.network.heal("p1", "d1")
        # At most 30 s shunned, and only a request that is sent there makes the link anew.
        wait_for(lambda: metric(decode, "antiphon_handoff_links") == 2, 60)
        load.more(len(asked))
    assert not load.problems
    assert load.slowest_seconds < HEARTBEAT_SECONDS + SLACK_SECONDS
    assert metric(prefill, "antiphon_handoff_links") == 2, "the broken link was left behind"


def test_lost_nodes_cost_a_pause_and_come_back(cluster: Cluster, asked: list[Question]) -> None:
    """One is switched off; of the other, all packets vanish."""
    with HttpLoad([cluster.url("d1")], asked) as load:
        cluster.order("kill", "p2")
        load.more(len(asked))
        cluster.network.isolate("d2")
        wait_for(lambda: "d2" not in cluster.workers(), 60)
        load.more(len(asked))
        cluster.order("kill", "d2")
        cluster.network.rejoin("d2")
        for name in ("p2", "d2"):
            cluster.order("start", name)
        cluster.wait_whole()
        load.more(len(asked))
    assert not load.problems
    assert load.slowest_seconds < HEARTBEAT_SECONDS + SLACK_SECONDS


def test_everything_serves_while_the_head_is_gone_and_serve_recovers(
    cluster: Cluster, asked: list[Question]
) -> None:
    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        victim = cluster.workers()["p1"]
        cluster.order("kill", "head")
        assert not is_ready(cluster.at("head"))
        load.more(len(asked))
        os.kill(victim["pid"], signal.SIGKILL)  # nobody can replace it now
        load.more(len(asked))
        cluster.order("start", "head")
        # Serve knows its replicas again, replaces the one that died, and the ingress hears of it.
        wait_for(lambda: cluster.workers().get("p1", victim)["pid"] != victim["pid"], 60)
        load.more(len(asked))
    assert not load.problems
    wait_for(lambda: is_ready(cluster.at("head")), 60)
    cluster.wait_whole("head")


def is_ready(product: Product) -> bool:
    try:
        return bool(product.get("/ready")["status"] == "ready")
    except OSError:
        return False


def test_a_rolling_update_of_pools_and_ingress_fails_no_request(
    cluster: Cluster, asked: list[Question]
) -> None:
    before = {worker["incarnation"] for worker in cluster.workers().values()}
    with HttpLoad([cluster.url("d1"), cluster.url("d2")], asked) as load:
        finish(cluster.deploy(max_batch_tokens=48))
        cluster.wait_whole()
        load.more(len(asked))
    assert not load.problems
    after = {worker["incarnation"] for worker in cluster.workers().values()}
    assert not before & after
