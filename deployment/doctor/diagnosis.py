"""All checks in the order in which they are worth reading, and their findings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from antiphon.deployment.doctor import cluster_checks, node_checks
from antiphon.deployment.doctor.facts import ClusterFacts, Finding

CHECKS: Mapping[str, Callable[[ClusterFacts], Iterable[Finding]]] = {
    "nodes": cluster_checks.check_nodes,
    "versions": cluster_checks.check_versions,
    "placement": cluster_checks.check_placement,
    "devices": node_checks.check_devices,
    "model": cluster_checks.check_model,
    "memory": node_checks.check_memory,
    "cores": node_checks.check_cores,
    "shared memory": node_checks.check_shared_memory,
    "open files": node_checks.check_files,
    "http port": node_checks.check_http,
    "ports": cluster_checks.check_ports,
    "clocks": cluster_checks.check_clocks,
    "links": cluster_checks.check_links,
}


def diagnose(facts: ClusterFacts) -> list[Finding]:
    """Everything that should be mended; what is the same in several places comes once."""
    merged: dict[Finding, list[str]] = {}
    for name, check in CHECKS.items():
        for finding in check(facts):
            merged.setdefault(replace(finding, check=name, where=""), []).append(finding.where)
    return [
        replace(finding, where=", ".join(dict.fromkeys(places)))
        for finding, places in merged.items()
    ]
