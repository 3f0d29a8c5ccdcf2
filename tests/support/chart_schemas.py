"""Holds what the chart renders against the schemas of Kubernetes and of what is added to it.

Kubernetes' own kinds are those of ``kubernetes-validate``, the Prometheus operator's those of
cloudcoil, which generates its models from the operator's; KubeRay's and the Gateway API's lie in
tests/helm. Pods inside the RayService are checked as pods.
"""

import functools
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1, v1alpha1
from helm_chart import ROOT, objects, only

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
def custom_kinds() -> dict[str, jsonschema.Draft202012Validator]:
    """The kinds that Kubernetes itself does not have."""
    rayservice, httproute = (
        {"properties": {"spec": yaml.safe_load((ROOT / "tests/helm" / name).read_text())}}
        for name in ("rayservice.yaml", "httproute.yaml")
    )
    operators = (v1.PodMonitor, v1.PrometheusRule, v1alpha1.ScrapeConfig)
    return {
        "RayService": _validator(rayservice),
        "HTTPRoute": _validator(httproute),
        **{kind.__name__: _validator(kind.model_json_schema()) for kind in operators},
    }


def _validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    schema = closed(schema)
    whole = ("apiVersion", "kind", "metadata")  # where the schema is of the spec alone
    schema["properties"] = {**dict.fromkeys(whole, True), **schema["properties"]}
    return jsonschema.Draft202012Validator({**schema, "required": [*whole, "spec"]})


def parts(rendered: str) -> list[dict[str, Any]]:
    """All that Kubernetes has a schema for, what is inside the RayService too."""
    found = [item for item in objects(rendered) if item["kind"] not in custom_kinds()]
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
    """Fail if Kubernetes of a version would refuse something, or drop a field."""
    assert nulls(objects(rendered), "") == []
    for item in objects(rendered):
        if schema := custom_kinds().get(item["kind"]):
            schema.validate(item)
    for part in parts(rendered):
        kubernetes_validate.validate(part, version, strict=True)
