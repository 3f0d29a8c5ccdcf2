"""What can be wrong between nodes, and with the cluster as a whole: facts in, findings out."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from antiphon.deployment.doctor.facts import OUT_OF_TIME, ClusterFacts, Finding, Severity
from antiphon.deployment.doctor.placement import hosts, ingress_needs, needs, nodes_for, place

_PACKAGES = "install antiphon {version} on every node, with one constraints.txt and Python"
# Nothing in serving depends on clocks; logs, traces and metrics of one request do.
_CLOCK_WARNING_SECONDS, _CLOCK_PROBLEM_SECONDS = 0.1, 1.0
_MEND_LINK = {
    "gloo": "look at the interface that has the node's address, and at what filters its ports",
    "nccl": "set NCCL_SOCKET_IFNAME and NCCL_IB_HCA for Ray there; NCCL_DEBUG=INFO says more",
}
_SLOW_SHARE = 0.5  # of a rate: below this a prediction is off by more than a factor of two


def check_nodes(facts: ClusterFacts) -> Iterator[Finding]:
    """Every node answers."""
    if not facts.members:
        yield Finding("cluster", "no living node", "one", "start Ray")
    for name, reason in facts.failures.items():
        yield Finding(
            name, reason, "an answer to every question",
            "look at the node's load and at Ray's log there; raise --time-limit if it is only slow",
        )  # fmt: skip


def check_versions(facts: ClusterFacts) -> Iterator[Finding]:
    """The same packages everywhere, and those that the package requires."""
    mend = _PACKAGES.format(version=facts.here["antiphon"])
    for name, versions in facts.versions.items():
        for package, wanted in facts.here.items():
            found = versions.get(package)
            if found != wanted:
                is_ours = package == "antiphon"
                yield Finding(
                    name,
                    f"{package} {found or 'is not installed'}"
                    f"{'; nothing else was looked at' if is_ours else ''}",
                    f"{package} {wanted or 'is not installed'}, as where this command runs", mend,
                )  # fmt: skip
    for name, node in facts.nodes.items():
        for unmet in node.unmet:
            yield Finding(name, unmet, "what the package requires", mend)
    yield from _nccl_versions(facts, mend)


def _nccl_versions(facts: ClusterFacts, mend: str) -> Iterator[Finding]:
    versions = {name: node.nccl for name, node in facts.nodes.items() if node.nccl is not None}
    usual = most_common(versions.values())
    for name, version in versions.items():
        if version != usual and facts.config.handoff.transport == "nccl":
            yield Finding(name, f"NCCL {version}", f"NCCL {usual}, as elsewhere", mend)


def check_model(facts: ClusterFacts) -> Iterator[Finding]:
    """Nodes that may load the model find the same under the same source, and it can be served."""
    if facts.shape_error is not None:
        yield Finding(
            "cluster", facts.shape_error, "a model whose needs can be counted",
            "name a model that can be served, or mend its config.json",
        )  # fmt: skip
    users = {node.name for node in hosts(facts.config, facts.members) or facts.members}
    models = {name: node.model for name, node in facts.nodes.items() if name in users}
    usual = most_common(model.fingerprint for model in models.values() if model.fingerprint)
    source = facts.config.model.source
    for name, model in models.items():
        if model.is_to_be_made:
            yield Finding(
                name, str(model.error), f"{source}, ready",
                "start antiphon serve there once, put a ready folder there, or let the first "
                "start take longer; a download needs a connection",
                Severity.WARNING,
            )  # fmt: skip
        elif model.error is not None:
            yield Finding(
                name, model.error, f"{source}, as on every node",
                "put the model there under the same source",
            )  # fmt: skip
        elif model.fingerprint != usual:
            yield Finding(
                name, f"weights or config.json with fingerprint {model.fingerprint}",
                f"fingerprint {usual}, as elsewhere", "copy the model from another node",
            )  # fmt: skip


def check_placement(facts: ClusterFacts) -> Iterator[Finding]:
    """Every worker and every ingress finds a place on nodes that hold nothing else."""
    if not facts.members:
        return  # said already
    placement = place(facts.config, facts.members)
    for role, missing in placement.missing.items():
        pool = facts.config.pools[role]
        able = len(nodes_for(facts.config, role, facts.members))
        yield Finding(
            "cluster",
            f"room for {pool.replicas - missing} of {pool.replicas} {role} workers; {able} of "
            f"{len(facts.members)} nodes can hold one",
            f"for each of them {_named(needs(pool))}",
            f"start more nodes, or Ray on them with other --resources; or lower {role}.replicas",
        )  # fmt: skip
    if placement.missing_ingresses:
        http = facts.config.http
        yield Finding(
            "cluster",
            f"room for {http.ingress_replicas - placement.missing_ingresses} of "
            f"{http.ingress_replicas} of the ingress beside the workers",
            f"for each of them {_named(ingress_needs(http))}",
            "start Ray on nodes with other --resources; or change http.resources",
        )  # fmt: skip


def _named(wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in wanted.items()) or "nothing"


def check_ports(facts: ClusterFacts) -> Iterator[Finding]:
    """A fresh port of each node, as sessions, metrics and links use, is reached from each other."""
    for path in facts.paths:
        if path.error is not None:
            yield Finding(
                path.where, path.error,
                "connections between all nodes, at ports that are chosen at start",
                "open the firewall, security group or network policy between these nodes",
            )  # fmt: skip


def check_clocks(facts: ClusterFacts) -> Iterator[Finding]:
    """Clocks agree, as far as round trips can tell."""
    reached = [path for path in facts.paths if path.error is None]
    if not reached:
        return
    start = reached[0].source
    seen = [path for path in reached if path.source == start]
    offsets = {start: 0.0, **{path.target: path.clock_offset_seconds for path in seen}}
    doubts = {start: 0.0, **{path.target: path.round_trip_seconds / 2 for path in seen}}
    usual = statistics.median_low(offsets.values())
    for name, offset in offsets.items():
        least = abs(offset - usual) - doubts[name]
        if least > _CLOCK_WARNING_SECONDS:
            is_far = least > _CLOCK_PROBLEM_SECONDS
            yield Finding(
                name, f"{offset - usual:+.3f} s from other nodes",
                f"at most {_CLOCK_WARNING_SECONDS} s, so that logs and metrics can be put in order",
                "run chrony or another NTP client there",
                Severity.PROBLEM if is_far else Severity.WARNING,
            )  # fmt: skip


def check_links(facts: ClusterFacts) -> Iterator[Finding]:
    """Each pair of a prefill and a decode node has a link, as fast as the router believes."""
    assumed = facts.config.router.link_bytes_per_second
    for link in facts.links:
        if link.error is not None:
            mend = _MEND_LINK[link.transport] if link.error != OUT_OF_TIME else "raise --time-limit"
            yield Finding(link.where, link.error, "a link for KV", mend)
        elif (
            link.transport == facts.config.handoff.transport
            and link.bytes_per_second < _SLOW_SHARE * assumed
        ):
            yield Finding(
                link.where, f"{link.bytes_per_second / 1e9:.2f} GB/s",
                f"{assumed / 1e9:.2f} GB/s, which the router expects",
                "mend the network, or set router.link_bytes_per_second to what is measured",
                Severity.WARNING,
            )  # fmt: skip


def most_common(values: Iterable[str | None]) -> str | None:
    """The value that most have; the first one seen of several."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None
