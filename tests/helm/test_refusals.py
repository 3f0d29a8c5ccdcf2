"""Nonsense is refused, by words that say what is wrong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import CHART, Helm

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nameOverride": "My_Model"}, "at '/nameOverride': 'My_Model' does not match"),
    ({"replicas": 3}, "additional properties 'replicas' not allowed"),
    ({"pools": {"prefil": {}}}, "at '/pools': additional properties 'prefil' not allowed"),
    (
        {"pools": {"prefill": {"replicas": 2}}},
        "at '/pools/prefill': additional properties 'replicas' not allowed",
    ),
    ({"config": {"decode": {"replica": 2}}}, "additional properties 'replica' not allowed"),
    (
        {"config": {"decode": {"engine": {"block_size": 0}}}},
        "at '/config/decode/engine/block_size': minimum: got 0, want 1",
    ),
    (
        {"config": {"decode": {"engine": {"kv_cache_dtype": "int4"}}}},
        "value must be one of 'auto', 'float32'",
    ),
    ({"config": {"http": {"port": 70000}}}, "at '/config/http/port': maximum: got 70,000"),
    ({"config": {"http": {"port": 8080}}}, "config.http.port: 8080 is the port of Ray's metrics"),
    (
        {"config": {"http": {"port": 8000}, "metrics": {"first_port": 8000}}},
        "config.http.port: 8000 is among the ports of config.metrics, 8000 to 8099",
    ),
    (
        {"config": {"decode": {"engine": {"kv_cache_bytes": "2 apples"}}}},
        "at '/config/decode/engine/kv_cache_bytes': '2 apples' does not match",
    ),
    (
        {"config": {"decode": {"engine": {"kv_cache_bytes": 0}}}},
        "at '/config/decode/engine/kv_cache_bytes': minimum: got 0, want 1",
    ),
    ({"config": {"model": {"source": "."}}}, "at '/config/model/source': '.' does not match"),
    ({"config": {"prefill": {"num_gpus": -1}}}, "minimum: got -1, want 0"),
    ({"pools": {"decode": {"workersPerPod": 0}}}, "minimum: got 0, want 1"),
    ({"pools": {"decode": {"memory": "8 GB"}}}, "at '/pools/decode/memory': '8 GB' does not match"),
    ({"head": {"cpu": "two"}}, "at '/head/cpu': 'two' does not match"),
    ({"image": {"pullPolicy": "Sometimes"}}, "must be one of 'Always', 'IfNotPresent', 'Never'"),
    ({"image": {"digest": "sha256:12"}}, "at '/image/digest': 'sha256:12' does not match"),
    ({"env": [{"NAME": "value"}]}, "at '/env/0': missing property 'name'"),
    ({"upgrade": {"strategy": "Rolling"}}, "must be one of 'NewCluster', 'None'"),
    ({"ingress": {"enabled": True}}, "at '/ingress/host': minLength: got 0, want 1"),
    ({"httpRoute": {"enabled": True}}, "at '/httpRoute/parentRefs': minItems: got 0, want 1"),
    ({"securityContext": {"userId": 0}}, "at '/securityContext/userId': minimum: got 0, want 1"),
    ({"networkPolicy": {"operatorPeers": []}}, "minItems: got 0, want 1"),
    (
        {"config": {"handoff": {"transport": "nccl"}, "prefill": {"num_gpus": 1}}},
        "config.handoff.transport is nccl, but config.decode.num_gpus is 0: NCCL connects whole",
    ),
    (
        {
            "config": {
                "handoff": {"transport": "nccl", "max_links": 33},
                "prefill": {"num_gpus": 1},
                "decode": {"num_gpus": 0.5},
            },
            "pools": {"decode": {"workersPerPod": 2}},
        },
        "config.handoff.transport is nccl, but config.decode.num_gpus is 0.5: NCCL connects whole",
    ),
    (
        {
            "config": {
                "handoff": {"transport": "nccl", "max_links": 33},
                "prefill": {"num_gpus": 1},
                "decode": {"num_gpus": 1},
            }
        },
        "config.handoff.transport is nccl, but config.handoff.max_links is 33: torch has streams",
    ),
    (
        {"pools": {"decode": {"nccl": {"ibHca": "mlx5_0"}}}},
        "pools.decode.nccl is set, but config.handoff.transport is gloo",
    ),
    (
        {
            "config": {
                "handoff": {"transport": "nccl"},
                "prefill": {"num_gpus": 1},
                "decode": {"num_gpus": 1},
            },
            "pools": {"prefill": {"nccl": {"env": {"NCCL_IB_HCA": "mlx5_0"}}}},
        },
        "pools.prefill.nccl.env: NCCL_IB_HCA is what pools.prefill.nccl.ibHca sets",
    ),
    (
        {"pools": {"prefill": {"nccl": {"env": {"UCX_TLS": "rc"}}}}},
        "at '/pools/prefill/nccl/env': additional properties 'UCX_TLS' not allowed",
    ),
    (
        {"pools": {"prefill": {"extraResources": {"nvidia.com/gpu": 1}}}},
        "pools.prefill.extraResources: nvidia.com/gpu follows from config.prefill.num_gpus",
    ),
    (
        {"pools": {"prefill": {"extraResources": {"rdma/hca": 0}}}},
        "at '/pools/prefill/extraResources/rdma~1hca': minimum: got 0, want 1",
    ),
    (
        {"pools": {"prefill": {"extraResources": {"cpu": 2}}}},
        "at '/pools/prefill/extraResources': additional properties 'cpu' not allowed",
    ),
    (
        {"pools": {"decode": {"hostNetwork": True}}},
        "pools.decode.hostNetwork: network policies neither protect nor recognise",
    ),
    (
        {"head": {"state": {"store": "redis"}}},
        "head.state.store is redis, but head.state.redis.address is empty",
    ),
    (
        {"head": {"state": {"redis": {"address": "redis:6379"}}}},
        "head.state.redis.address is set, but head.state.store is none",
    ),
    ({"head": {"state": {"store": "etcd"}}}, "must be one of 'none', 'redis', 'rocksdb'"),
    (
        {"config": {"decode": {"replicas": 0}, "colocated": {"replicas": 1}}},
        "config.prefill.replicas is 1 but config.decode.replicas is 0; prefill workers need decode",
    ),
    (
        {"config": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}}},
        "config.decode.replicas and config.colocated.replicas are both 0: nothing can decode",
    ),
    (
        {"config": {"decode": {"num_gpus": 0.5}}},
        "pools.decode.workersPerPod: 1 workers with config.decode.num_gpus 0.5 make 0.5 GPUs",
    ),
    (
        {"pools": {"decode": {"maxPods": 4}}},
        "pools.decode.maxPods: got 4, but autoscaling.enabled is false",
    ),
    (
        {"autoscaling": {"enabled": True}, "pools": {"prefill": {"maxPods": 1}}},
        "pools.decode.maxPods: got 0, but its workers need 1 pods",
    ),
    (
        {
            "autoscaling": {"enabled": True},
            "pools": {"prefill": {"maxPods": 1}, "decode": {"maxPods": 3, "sparePods": 1}},
        },
        "pools.decode.sparePods: got 1, but with autoscaling.enabled a pod without a worker is",
    ),
    (
        {
            "autoscaling": {"enabled": True},
            "config": {"decode": {"replicas": 5}},
            "pools": {
                "prefill": {"maxPods": 1},
                "decode": {"maxPods": 2, "workersPerPod": 2},
            },
        },
        "pools.decode.maxPods: got 2, but its workers need 3 pods",
    ),
    (
        {"terminationGracePeriodSeconds": 90},
        "may take 60 s to finish, and 40 s are needed around that: at least 100",
    ),
    ({"apiKeys": {"keys": ["with blank"]}}, "at '/apiKeys/keys/0': 'with blank' does not match"),
    ({"apiKeys": {"keys": ["#comment"]}}, "at '/apiKeys/keys/0': '#comment' does not match"),
    ({"config": {"http": {"api_key_file": "keys"}}}, "at '/config/http/api_key_file': 'keys'"),
    (
        {"apiKeys": {"keys": ["k"], "existingSecret": "s"}},
        "apiKeys.keys and apiKeys.existingSecret are both set; put all keys into the Secret s",
    ),
    (
        {"apiKeys": {"keys": ["k"]}, "config": {"http": {"api_key_file": "/keys"}}},
        "config.http.api_key_file is /keys, but with apiKeys the chart sets it",
    ),
    (
        {"config": {"http": {"metrics_need_key": True}}},
        "config.http.metrics_need_key is true, but apiKeys has no keys",
    ),
    (
        {
            "apiKeys": {"keys": ["k"]},
            "config": {"http": {"metrics_need_key": True}},
            "scrapeConfig": {"enabled": True},
        },
        "scrapeConfig.keySecret.name: config.http.metrics_need_key is true",
    ),
    ({"scrapeConfig": {"prometheusPeers": []}}, "minItems: got 0, want 1"),
    (
        {"prometheusRule": {"objectives": {"ttft": 1}}},
        "at '/prometheusRule/objectives/ttft': exclusiveMaximum: got 1, want 1",
    ),
    ({"prometheusRule": {"objectives": {"tpot": 0.9}}}, "additional properties 'tpot' not allowed"),
    (
        {"config": {"metrics": {"first_port": 32700}}},
        "config.metrics.first_port: ports 32700 to 32799 are among those that Linux chooses",
    ),
    (
        {"modelCache": {"persistentVolumeClaim": {"existingClaim": "cache"}}},
        "existingClaim is set but modelCache.persistentVolumeClaim.enabled is false",
    ),
    (
        {"modelCache": {"persistentVolumeClaim": {"accessModes": ["ReadWriteOncePod"]}}},
        "at '/modelCache/persistentVolumeClaim/accessModes/0': value must be one of",
    ),
    (
        {"networkPolicy": {"egress": [{"ports": [{"port": 443}]}]}},
        "networkPolicy.egress is set but networkPolicy.restrictEgress is false",
    ),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words[:60] for _, words in REFUSED])
def test_nonsense_is_refused(helm: Helm, values: dict[str, Any], words: str) -> None:
    answer = helm.template(overrides=values)
    assert answer.returncode != 0
    assert words in answer.stderr, answer.stderr


def test_a_release_whose_name_kuberay_would_refuse_is_refused(helm: Helm) -> None:
    answer = helm.run("template", "7th", str(CHART))
    assert (
        'the name "7th-antiphon", which KubeRay does not accept: set nameOverride' in answer.stderr
    )
    assert helm.run("template", "7th", str(CHART), "--set", "nameOverride=seventh").returncode == 0


def test_what_another_chart_that_depends_on_this_one_adds_is_not_refused(
    helm: Helm, tmp_path: Path
) -> None:
    """Helm puts ``global`` into the values then, whether the other one has any or not."""
    shutil.copytree(CHART, tmp_path / "parent/charts/antiphon")
    chart = {"apiVersion": "v2", "name": "parent", "version": "0.1.0"}
    (tmp_path / "parent/Chart.yaml").write_text(yaml.safe_dump(chart))
    answer = helm.run("template", "demo", str(tmp_path / "parent"))
    assert answer.returncode == 0, answer.stderr
    assert "kind: RayService" in answer.stdout
