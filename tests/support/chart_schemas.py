"""Holds what the chart renders against the schemas of Kubernetes and KubeRay.

Pods inside the RayService are checked as pods. The kinds of the Gateway API and of the Prometheus
operator have no schema here.
"""

import functools
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from helm_chart import ROOT, objects, only

WITHOUT_SCHEMA = {"HTTPRoute", "PodMonitor", "PrometheusRule", "RayService", "ScrapeConfig"}
VERSIONS = ["1.29", "1.37"]  # the oldest that Chart.yaml allows, and the newest schemas


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
    text = (ROOT / "tests/helm/rayservice.yaml").read_text()
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
    """Fail if Kubernetes of a version, or KubeRay, would refuse something or drop a field."""
    assert nulls(objects(rendered), "") == []
    rayservice_schema().validate(only(rendered, "RayService")["spec"])
    for part in parts(rendered):
        kubernetes_validate.validate(part, version, strict=True)
