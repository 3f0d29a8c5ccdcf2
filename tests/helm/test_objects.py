"""Everything the chart renders is what Kubernetes and KubeRay accept.

Pods inside the RayService are checked as pods. The two kinds without a schema here, of the Gateway
API and of the Prometheus operator, are read over in the golden files.
"""

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_chart import CHART, EXAMPLES, GOLDEN, Helm, objects, only, readme_text, schema_text

from antiphon import __version__

WITHOUT_SCHEMA = {"HTTPRoute", "PodMonitor", "RayService"}
VERSIONS = ["1.29", "1.37"]  # the oldest that Chart.yaml allows, and the newest schemas
EVERYTHING = {
    "config": {"colocated": {"replicas": 2, "num_gpus": 0.5}},
    "pools": {
        "colocated": {
            "workersPerPod": 2,
            "gpu": {"runtimeClassName": "nvidia"},
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "serving",
            "podAnnotations": {"a": "b"},
        }
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
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "networkPolicy": {
        "restrictEgress": True,
        "egress": [{"ports": [{"port": 443}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
}


def closed(schema: Any) -> Any:
    """Kubernetes drops unknown fields of a custom resource in silence; here they are errors."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema and not keeps_unknown:
        schema.setdefault("additionalProperties", False)
    return schema


@functools.cache
def rayservice_schema() -> jsonschema.Draft202012Validator:
    text = (Path(__file__).parent / "rayservice.yaml").read_text()
    return jsonschema.Draft202012Validator(closed(yaml.safe_load(text)))


def parts(rendered: str) -> list[dict[str, Any]]:
    """All that Kubernetes has a schema for, what is inside the RayService too."""
    found = [item for item in objects(rendered) if item["kind"] not in WITHOUT_SCHEMA]
    spec = only(rendered, "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]
    return [*found, *pods, spec["serveService"]]


def nulls(part: Any, path: str) -> list[str]:
    """Where a value is missing; Kubernetes' own schemas let that pass, KubeRay's do not."""
    if isinstance(part, dict):
        return [found for key, value in part.items() for found in nulls(value, f"{path}.{key}")]
    if isinstance(part, list):
        return [
            found for index, value in enumerate(part) for found in nulls(value, f"{path}.{index}")
        ]
    return [path] if part is None else []


def check(rendered: str, version: str) -> None:
    assert nulls(objects(rendered), "") == []
    rayservice_schema().validate(only(rendered, "RayService")["spec"])
    for part in parts(rendered):
        kubernetes_validate.validate(part, version, strict=True)


def test_lint_finds_nothing(helm: Helm) -> None:
    for example in EXAMPLES:
        answer = helm.run("lint", "--strict", str(CHART), "--values", str(example))
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_examples_are_what_kubernetes_and_kuberay_accept(rendered: str, version: str) -> None:
    check(rendered, version)


def test_every_option_at_once_is_what_kubernetes_and_kuberay_accept(helm: Helm) -> None:
    check(helm.render(CHART / "examples/multi-node.yaml", EVERYTHING), VERSIONS[-1])


def test_the_check_sees_a_wrong_field(helm: Helm) -> None:
    right = helm.render()
    for wrong in (
        right.replace("groupName:", "groupname:"),
        right.replace("readOnlyRootFilesystem:", "readOnlyRootFileSystem:"),
        right.replace("minReplicas: 1", "minReplicas: one"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, VERSIONS[-1])


def test_examples_render_as_before(rendered: str, example: Path) -> None:
    golden = (GOLDEN / example.name).read_text()
    assert rendered == golden, "if this is meant: make chart, and read the difference"


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
