"""Five Ray nodes on a network of namespaces, with a worker on each but the head.

    head   Ray's and Serve's control, and a proxy
    p1 p2  a prefill worker and a proxy each
    d1 d2  a decode worker, an ingress and a proxy each

Nodes get the environment that deployment/ray-cluster.yaml gives real machines.
"""

import json
import re
import secrets
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import pytest
import ray_nodes
import yaml
from network import Network
from processes import Product, sum_of, wait_for

NODES = ["head", "p1", "p2", "d1", "d2"]
PORT = 8000
DEPLOY_SECONDS = 120.0
_CLUSTER_FILE = Path(__file__).parents[2] / "deployment/ray-cluster.yaml"
# Ray's defaults take a minute to declare a node dead whose packets vanish.
_QUICK = {"period_ms": "1000", "timeout_ms": "2000", "initial_delay_ms": "1000"}


@dataclass
class NodeCluster:
    """The nodes, and what plays the platform team."""

    network: Network
    nodes: Product
    folder: Path
    model: Path

    def order(self, what: str, *names: str) -> None:
        """Kill or start nodes, and wait until that is done."""
        line = f"{what} {' '.join(str(NODES.index(name)) for name in names)}"
        log = self.nodes.log.read_text
        num_before = log().count(line)
        assert self.nodes.process.stdin is not None
        self.nodes.process.stdin.write(f"{line}\n".encode())
        self.nodes.process.stdin.flush()
        wait_for(lambda: log().count(line) > num_before, 60, log)

    def deploy(self, **engine: int) -> None:
        """Deploy the application, or update it, with a program that then leaves."""
        document = self.folder / "config.yaml"
        document.write_text(yaml.safe_dump(_config(self.model, engine)))
        script = str(Path(network.__file__).with_name("deploy_on.py"))
        address = f"{self.network.address_of('head')}:6379"
        command = ["python", script, self.network.namespace("head"), address, str(document)]
        deploying = Product(command, PORT, self.folder)
        try:
            log = deploying.log.read_text
            wait_for(lambda: deploying.process.poll() is not None, DEPLOY_SECONDS, log)
            assert deploying.process.returncode == 0, log()
        finally:
            deploying.kill()

    def url(self, name: str) -> str:
        """Of the HTTP proxy on a node."""
        return f"http://{self.network.address_of(name)}:{PORT}"

    def workers(self, through: str = "d1") -> dict[str, dict[str, Any]]:
        """By name of their node, as the ingress says that the proxy of a node chooses."""
        names = {self.network.address_of(name): name for name in NODES}
        return {names[worker["node"]]: worker for worker in self._get(through, "/workers")}

    def ingresses(self, through: str = "d1") -> set[str]:
        """Replica ids, as the ingress says that the proxy of a node chooses."""
        labels = [target["labels"] for target in self._get(through, "/metrics/targets")]
        return {each["worker"] for each in labels if each["pool"] == "ingress"}

    def _get(self, through: str, path: str) -> Any:
        with urllib.request.urlopen(self.url(through) + path, timeout=10) as answer:
            return json.load(answer)

    def seen(self, through: str) -> str:
        """What an ingress knows of the workers, or why it says nothing; for people."""
        try:
            return f"{through}: {self.workers(through)}"
        except OSError as error:
            return f"{through}: {error!r}"

    def is_ready(self, name: str) -> bool:
        """Whether the endpoint answers on a node, and has a worker of each pool."""
        try:
            with urllib.request.urlopen(f"{self.url(name)}/ready", timeout=10) as answer:
                return bool(json.load(answer)["status"] == "ready")
        except OSError:
            return False

    def wait_whole(self) -> None:
        """Wait until each proxy answers, and each ingress has all workers, the same ones."""

        def is_whole() -> bool:
            try:
                known = [self.workers(name) for name in ("d1", "d2")]
            except OSError:
                return False
            lives = [{w["incarnation"] for w in workers.values()} for workers in known]
            return len(lives[0]) == 4 and lives[0] == lives[1] and all(map(self.is_ready, NODES))

        def explain() -> str:
            ready = {name: self.is_ready(name) for name in NODES}
            return f"ready: {ready}; {self.seen('d1')}; {self.seen('d2')}"

        wait_for(is_whole, 90, explain)


def metric(worker: dict[str, Any], name: str, **labels: str) -> float:
    """Sum of a worker's own samples."""
    host = worker["url"].removeprefix("ws://").partition("/")[0]
    with urllib.request.urlopen(f"http://{host}/metrics", timeout=30) as answer:
        return sum_of(answer.read().decode(), name, labels)


@contextmanager
def node_cluster(folder: Path, model: Path) -> Iterator[NodeCluster]:
    """Start nodes and deploy the application; at the end nothing of it is left, whatever happened.

    Args:
        folder: Empty; for logs and Ray's state.
        model: To serve.
    """
    with pytest.MonkeyPatch.context() as patch, network.network(NODES) as made:
        for key, value in _environment(folder / "gcs").items():
            patch.setenv(key, value)
        options = json.dumps([_node_options(made, name) for name in NODES])
        nodes = Product(["python", ray_nodes.__file__, options], PORT, folder)
        try:
            log = nodes.log.read_text
            code = nodes.process.poll
            wait_for(lambda: ray_nodes.read_address(log()) or code() is not None, 120, log)
            assert code() is None, log()
            opened = NodeCluster(made, nodes, folder / "deploy", model)
            opened.folder.mkdir()
            opened.deploy()
            opened.wait_whole()
            yield opened
        finally:
            nodes.kill()


def _environment(gcs_folder: Path) -> dict[str, str]:
    """What deployment/ray-cluster.yaml sets for Ray on the head, and so on all nodes here."""
    head = " ".join(yaml.safe_load(_CLUSTER_FILE.read_text())["head_start_ray_commands"])
    return {
        **dict(re.findall(r"(RAY_\w+)=(\S+)", head)),
        **{f"RAY_health_check_{key}": value for key, value in _QUICK.items()},
        "RAY_gcs_storage_path": str(gcs_folder),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }


def _node_options(made: Network, name: str) -> dict[str, Any]:
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


def _config(model: Path, engine: dict[str, int]) -> dict[str, Any]:
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


class Rebuilt:
    """Lends the same cluster to each test, and another one after a test that failed.

    Args:
        folder: For as many clusters as it takes.
        model: To serve.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self._num_made = 0
        self._num_failed = 0
        self._open: NodeCluster | None = None
        self._closing = ExitStack()
        self._why_none: Exception | None = None

    def get(self, num_failed: int) -> NodeCluster:
        """Return a whole cluster.

        Args:
            num_failed: Tests that have failed; if one has since the last call, what it left behind
                is thrown away, so that it fails alone.
        """
        if num_failed != self._num_failed:
            self.close()
        self._num_failed = num_failed
        if self._open is None:
            self._open = self._make()
        self._open.wait_whole()
        return self._open

    def close(self) -> None:
        """End what is open."""
        self._open = None
        self._closing.close()

    def _make(self) -> NodeCluster:
        if self._why_none is not None:  # no test waits minutes for the next one to fail
            raise self._why_none
        folder = self._folder / str(self._num_made)
        folder.mkdir()
        self._num_made += 1
        try:
            return self._closing.enter_context(node_cluster(folder, self._model))
        except Exception as error:
            self._why_none = error
            raise
