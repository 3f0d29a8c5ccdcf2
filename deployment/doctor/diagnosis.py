"""All checks in the order in which they are worth reading, and their findings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from antiphon.deployment.doctor.cluster_checks import (
    check_clocks,
    check_links,
    check_model,
    check_nodes,
    check_placement,
    check_ports,
    check_versions,
)
from antiphon.deployment.doctor.facts import ClusterFacts, Finding
from antiphon.deployment.doctor.node_checks import (
    check_cores,
    check_devices,
    check_files,
    check_http,
    check_memory,
    check_shared_memory,
)

CHECKS: Mapping[str, Callable[[ClusterFacts], Iterable[Finding]]] = {
    "nodes": check_nodes,
    "versions": check_versions,
    "placement": check_placement,
    "devices": check_devices,
    "model": check_model,
    "memory": check_memory,
    "cores": check_cores,
    "shared memory": check_shared_memory,
    "open files": check_files,
    "http port": check_http,
    "ports": check_ports,
    "clocks": check_clocks,
    "links": check_links,
}


def diagnose(facts: ClusterFacts) -> list[Finding]:
    """Everything that should be mended; what is the same in several places comes once."""
    merged: dict[Finding, list[str]] = {}
    for check in CHECKS.values():
        for finding in check(facts):
            merged.setdefault(replace(finding, where=""), []).append(finding.where)
    return [
        replace(finding, where=", ".join(dict.fromkeys(places)))
        for finding, places in merged.items()
    ]
