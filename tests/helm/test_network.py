"""How pools reach each other over NCCL, and how the head's state outlives the head."""

from pathlib import Path
from typing import Any

from helm_chart import CHART, Helm, only

MULTI_NODE: Path = CHART / "examples/multi-node.yaml"
GPUS: dict[str, Any] = {role: {"num_gpus": 1} for role in ("prefill", "decode")}


def cluster(rendered: str) -> dict[str, Any]:
    spec: dict[str, Any] = only(rendered, "RayService")["spec"]["rayClusterConfig"]
    return spec


def pods(rendered: str) -> dict[str, dict[str, Any]]:
    """The pod of each group, and that of the head."""
    found = {
        group["groupName"]: group["template"]["spec"]
        for group in cluster(rendered)["workerGroupSpecs"]
    }
    return {**found, "head": cluster(rendered)["headGroupSpec"]["template"]["spec"]}


def environment(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names))
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


def nccl_of(pod: dict[str, Any]) -> dict[str, str]:
    return {name: v for name, v in environment(pod).items() if name.startswith("NCCL_")}


def test_nccl_finds_its_way_in_each_pool_and_only_there(helm: Helm) -> None:
    nccl = {"socketIfname": "^lo", "ibHca": "=mlx5_0:1", "env": {"NCCL_DEBUG": "INFO"}}
    values = {
        "config": {**GPUS, "handoff": {"transport": "nccl"}},
        "pools": {"prefill": {"nccl": nccl}, "decode": {"nccl": {"socketIfname": "ib0"}}},
    }
    rendered = pods(helm.render(overrides=values))
    assert {name: nccl_of(pod) for name, pod in rendered.items()} == {
        "prefill": {
            "NCCL_SOCKET_IFNAME": "^lo",
            "NCCL_IB_HCA": "=mlx5_0:1",
            "NCCL_DEBUG": "INFO",
        },
        "decode": {"NCCL_SOCKET_IFNAME": "ib0"},
        "head": {},
    }


def test_a_network_card_and_locked_memory_belong_to_the_pods_that_ask(helm: Helm) -> None:
    card = {"rdma/hca_shared_devices_a": 2}
    values = {"config": GPUS, "pools": {"decode": {"extraResources": card, "ipcLock": True}}}
    for name, pod in pods(helm.render(overrides=values)).items():
        (container,) = pod["containers"]
        expected = card if name == "decode" else {}
        for kind in ("requests", "limits"):
            asked = container["resources"][kind]
            assert {n: k for n, k in asked.items() if n.startswith("rdma")} == expected
        capabilities = {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if expected else {})}
        assert container["securityContext"]["capabilities"] == capabilities


def test_a_pool_may_run_in_the_network_of_its_nodes(helm: Helm) -> None:
    values = {
        "pools": {"prefill": {"hostNetwork": True}},
        "networkPolicy": {"enabled": False},
    }
    rendered = pods(helm.render(overrides=values))
    assert rendered["prefill"]["hostNetwork"] is True
    assert rendered["prefill"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert not {"hostNetwork", "dnsPolicy"} & (rendered["decode"].keys() | rendered["head"].keys())


def test_the_multi_node_example_uses_them(helm: Helm) -> None:
    rendered = pods(helm.render(MULTI_NODE))
    assert nccl_of(rendered["prefill"]) == nccl_of(rendered["decode"]) != {}


def test_by_default_the_state_of_the_head_dies_with_it(helm: Helm) -> None:
    assert "gcsFaultToleranceOptions" not in cluster(helm.render())


def test_redis_keeps_the_state_and_its_password_stays_in_the_secret(helm: Helm) -> None:
    state = {
        "store": "redis",
        "redis": {"address": "redis:6379", "username": "ray", "passwordSecret": {"name": "s"}},
    }
    options = cluster(helm.render(overrides={"head": {"state": state}}))["gcsFaultToleranceOptions"]
    assert options == {
        "redisAddress": "redis:6379",
        "redisUsername": {"value": "ray"},
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "s", "key": "password"}}},
    }


def test_a_volume_keeps_the_state(helm: Helm) -> None:
    state = {"store": "rocksdb", "rocksdb": {"storageClassName": "fast"}}
    options = cluster(helm.render(overrides={"head": {"state": state}}))["gcsFaultToleranceOptions"]
    storage = {"size": "10Gi", "storageClassName": "fast"}
    assert options == {"backend": "rocksdb", "storage": storage}
