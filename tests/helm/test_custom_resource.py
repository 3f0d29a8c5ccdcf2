"""The schema that RayServices are checked against says what KubeRay's own says."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import ROOT

CUT = ROOT / "tests/helm/rayservice.yaml"
_BESIDE = ROOT.parent / "shared/data/kuberay/ray.io_rayservices.yaml"
FULL = Path(os.environ.get("KUBERAY_CRD", _BESIDE))
CLUSTER = "properties.rayClusterConfig.properties."
LEFT_OUT = {
    f"{CLUSTER}historyServerOptions",
    f"{CLUSTER}networkPolicy",
    f"{CLUSTER}headGroupSpec.properties.template.properties",
    f"{CLUSTER}workerGroupSpecs.items.properties.template.properties",
    "properties.serveService.properties.status",
}
# In place of a pod's fields, which are checked by Kubernetes' schemas.
PUT_IN = {
    f"{CLUSTER}headGroupSpec.properties.template.x-kubernetes-preserve-unknown-fields",
    f"{CLUSTER}workerGroupSpecs.items.properties.template.x-kubernetes-preserve-unknown-fields",
}


def differences(cut: Any, full: Any, path: str = "") -> list[tuple[str, str]]:
    """What one has and the other has not, and where they differ."""
    if not (isinstance(cut, dict) and isinstance(full, dict)):
        return [] if cut == full else [("differs", path)]
    found = []
    for key in sorted(cut.keys() | full.keys()):
        where = f"{path}.{key}".removeprefix(".")
        if key not in cut:
            found.append(("left out", where))
        elif key not in full:
            found.append(("put in", where))
        else:
            found += differences(cut[key], full[key], where)
    return found


def test_the_schema_is_a_part_of_kuberays() -> None:
    if not FULL.is_file():
        pytest.skip(f"KubeRay's CustomResourceDefinition is not at {FULL}: set KUBERAY_CRD to it")
    versions = yaml.safe_load(FULL.read_text())["spec"]["versions"]
    (served,) = [version for version in versions if version["name"] == "v1"]
    full = served["schema"]["openAPIV3Schema"]["properties"]["spec"]
    expected = {("left out", path) for path in LEFT_OUT} | {("put in", path) for path in PUT_IN}
    assert set(differences(yaml.safe_load(CUT.read_text()), full)) == expected


def test_a_difference_is_seen() -> None:
    full = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert differences({"a": {"b": 2, "c": [1], "e": 3}}, full) == [
        ("differs", "a.b"),
        ("put in", "a.e"),
        ("left out", "d"),
    ]
