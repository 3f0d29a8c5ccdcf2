"""What the chart renders runs: Serve's document on nodes like its pods, one of which then leaves.

Stands in for a Kubernetes cluster: one Ray node for each pod, with the options that the chart gives
``ray start``, and Serve's own command for KubeRay's request to the dashboard.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import ray_nodes
import yaml
from helm_chart import CHART, Helm, only, serve_config
from processes import Product, free_port, wait_for

from antiphon.config import DEFAULT_MODEL
from antiphon.deployment.pod_readiness import FOLDER_VARIABLE, why_not_ready

pytestmark = pytest.mark.e2e


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A cluster of the CPU example's pods and a spare one for decode; its address and HTTP port."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as KubeRay does where ray.auth is token
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    monkeypatch.setenv("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", "1")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "pod"))  # one for all: they share a machine
    port = free_port()
    (tmp_path / "helm").mkdir()
    helm = Helm(tmp_path / "helm")
    config = {"http": {"port": port}}
    rendered = helm.render(CHART / "examples/one-node-cpu.yaml", {"config": config})
    cluster = only(rendered, "RayService")["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods.append(next(pod for pod in pods if pod.get("groupName") == "decode"))
    options = [ray_nodes.node_options(pod["rayStartParams"]) for pod in pods]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(serve_config(rendered)))
    (tmp_path / "cluster").mkdir()
    running = Product(
        ["python", ray_nodes.__file__, json.dumps(options)], port, tmp_path / "cluster"
    )
    try:
        log = running.log.read_text
        wait_for(lambda: bool(ray_nodes.read_address(log())), 120, log)
        yield ray_nodes.read_address(log()), port
    finally:
        running.stop()


@pytest.fixture
def product(nodes: tuple[str, int], tmp_path: Path) -> Iterator[Product]:
    address, port = nodes
    served = Product(["serve", "run", "serve.yaml", "--address", address], port, tmp_path)
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.stop()


def replicas(address: str) -> dict[str, str]:
    """Node of each living replica, by pool."""
    program = (
        "import json, ray; from ray._private.state import actors; "
        f"ray.init({address!r}, log_to_driver=False, logging_level='ERROR'); "
        "print(json.dumps({a['Name'].split('#')[1]: a['Address']['NodeID'] for a in "
        "actors().values() if a['State'] == 'ALIVE' and '#' in a['Name']}))"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_the_rendered_application_answers_and_a_pod_leaves_without_cutting_a_stream(
    nodes: tuple[str, int], product: Product, tmp_path: Path
) -> None:
    address, port = nodes
    client = openai.OpenAI(base_url=f"{product.url}/v1", api_key="none", max_retries=0)
    before = replicas(address)
    assert len({before["prefill"], before["decode"]}) == 2, "each pool has its own pods"
    (worker,) = product.workers("decode")

    def read_stream() -> tuple[int, str | None]:
        stream = client.completions.create(
            model=DEFAULT_MODEL,
            prompt="Count: 1 2 3",
            max_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        num_tokens, reason = 0, None
        for chunk in stream:
            num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
            reason = chunk.choices[0].finish_reason or reason if chunk.choices else reason
        return num_tokens, reason

    def is_streaming() -> bool:
        load = product.workers("decode")[0]["load"]
        return bool(load and load["num_running"])

    def drain() -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / "antiphon", "drain", "--within", "100"]
        return subprocess.run(
            [*command, "--node", before["decode"]],
            env=ray_nodes.shell(tmp_path, address),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def readiness() -> str | None:
        return why_not_ready(tmp_path / "pod", port)

    assert readiness() is None
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(read_stream)
        wait_for(is_streaming, 20)
        draining = threads.submit(drain)
        # The old worker serves until its successor does, whose pod is not ready before.
        wait_for(lambda: readiness() == "a worker still loads", 60)
        left = draining.result(timeout=150)
        assert left.returncode == 0, left.stdout + left.stderr
        assert answer.result(timeout=60) == (100, "length")
    wait_for(lambda: readiness() is None, 30)
    assert replicas(address)["decode"] != before["decode"]
    (successor,) = product.workers("decode")
    assert successor["incarnation"] != worker["incarnation"]
    assert client.completions.create(model=DEFAULT_MODEL, prompt="Again", max_tokens=2).usage
