"""Everything the chart renders is what Kubernetes, KubeRay and the operators accept."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chart_schemas import VERSIONS, check
from helm_chart import (
    CHART,
    EXAMPLES,
    GOLDEN,
    Helm,
    golden_text,
    readme_text,
    schema_text,
)

from antiphon import __version__

EVERYTHING = {
    "config": {"colocated": {"replicas": 2, "num_gpus": 0.5}},
    "pools": {
        "prefill": {"maxPods": 1},
        "decode": {"maxPods": 2},
        "colocated": {
            "workersPerPod": 2,
            "maxPods": 1,
            "gpu": {"runtimeClassName": "nvidia"},
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "serving",
            "podAnnotations": {"a": "b"},
        },
    },
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "imagePullSecrets": [{"name": "registry"}],
    "ingress": {
        "enabled": True,
        "host": "llm.example.com",
        "className": "nginx",
        "tlsSecret": "certificate",
        "annotations": {"a": "b"},
    },
    "apiKeys": {"keys": ["sk-1", "sk-2"], "existingSecret": "", "secretKey": "file"},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
        "hostnames": ["llm.example.com"],
        "requestTimeout": "30m",
    },
    "scrapeConfig": {"enabled": True, "labels": {"a": "b"}, "keySecret": {"name": "one-key"}},
    "podMonitor": {"enabled": True, "labels": {"a": "b"}},
    "prometheusRule": {"enabled": True, "labels": {"a": "b"}},
    "dashboards": {"enabled": True},
    "networkPolicy": {
        "restrictEgress": True,
        "egress": [{"ports": [{"port": 443}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
}


def test_lint_finds_nothing(helm: Helm) -> None:
    for example in EXAMPLES:
        answer = helm.run("lint", "--strict", str(CHART), "--values", str(example))
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_examples_are_what_kubernetes_and_kuberay_accept(rendered: str, version: str) -> None:
    check(rendered, version)


def test_every_option_at_once_is_what_kubernetes_and_kuberay_accept(helm: Helm) -> None:
    check(helm.render(CHART / "examples/multi-node.yaml", EVERYTHING), VERSIONS[-1])


@pytest.mark.parametrize(
    "state",
    [
        {"store": "redis", "redis": {"address": "rediss://redis:6380", "username": "ray"}},
        {"store": "rocksdb", "rocksdb": {"size": "20Gi", "storageClassName": "fast"}},
    ],
    ids=lambda state: str(state["store"]),
)
def test_each_store_of_the_head_is_what_kuberay_accepts(helm: Helm, state: dict[str, Any]) -> None:
    check(helm.render(overrides={"head": {"state": state}}), VERSIONS[-1])


@pytest.fixture(scope="module")
def everything(helm: Helm) -> str:
    return helm.render(CHART / "examples/multi-node.yaml", EVERYTHING)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("groupName:", "groupname:"),
        ("readOnlyRootFilesystem:", "readOnlyRootFileSystem:"),
        ("minReplicas: 1", "minReplicas: one"),
        ("type: PathPrefix", "type: Prefix"),  # HTTPRoute
        ("request: 30m", "request: 30 minutes"),
        ("parentRefs:", "parents:"),
        ("httpSDConfigs:", "httpSdConfigs:"),  # ScrapeConfig
        ("refreshInterval: 15s", "refreshInterval: quarterly"),
        ("podMetricsEndpoints:", "endpoints:"),  # PodMonitor
        ("alert: AntiphonDown", "alarm: AntiphonDown"),  # PrometheusRule
        ("for: 5m", "for: five minutes"),
    ],
)
def test_the_check_sees_a_wrong_field(everything: str, right: str, wrong: str) -> None:
    assert right in everything
    with pytest.raises(jsonschema.ValidationError):
        check(everything.replace(right, wrong), VERSIONS[-1])


def test_examples_render_as_before(rendered: str, example: Path) -> None:
    golden = (GOLDEN / example.name).read_text()
    assert golden_text(rendered) == golden, "if this is meant: make chart, and read the difference"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {path.name for path in EXAMPLES}


def test_generated_parts_are_fresh() -> None:
    assert (CHART / "values.schema.json").read_text() == schema_text(), "make chart"
    assert (CHART / "README.md").read_text() == readme_text(), "make chart"


def test_the_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    constraints = (CHART.parents[1] / "constraints.txt").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f"\nray=={values['ray']['version']}\n" in constraints
