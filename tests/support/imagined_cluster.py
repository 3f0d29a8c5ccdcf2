"""Facts of a cluster without fault, to be spoilt: a prefill node, two for decode, and the head."""

from dataclasses import replace
from typing import Any

from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.doctor.facts import (
    ClusterFacts,
    GpuFacts,
    LinkFacts,
    ModelFacts,
    Node,
    NodeFacts,
    PathFacts,
)
from antiphon.workers.model_shape import LayerShape, ModelShape

GB = 10**9
VERSIONS = {
    "python": "3.11.9", "antiphon": "0.1.0", "ray": "2.60.0", "torch": "2.13.0",
    "triton": "3.7.1", "transformers": "5.23.0",
}  # fmt: skip
H100 = GpuFacts("H100", "sm_90", 80 * GB, 79 * GB)
SHAPE = ModelShape(
    family="llama", dtype="bfloat16", max_context_tokens=8192, num_parameters=8 * GB,
    num_lookup_parameters=0, num_output_parameters=0, num_expert_parameters=0, expert_share=1.0,
    layers=(LayerShape(32, 8, 128, 128),) * 32,
)  # fmt: skip
GOOD_NODE = NodeFacts(
    unmet=(), nccl="2.28.9", gpus=(H100, H100), gpu_error=None, cores=16.0,
    memory_bytes=128 * GB, free_bytes=120 * GB, shared_memory_bytes=16 * GB,
    max_open_files=65536, wait_policy="PASSIVE", http_error=None, model=ModelFacts("abc"),
)  # fmt: skip
HEAD = replace(GOOD_NODE, gpus=(), nccl=None)
MEMBERS = (
    Node("head", "10.0.0.10", {}, 128 << 20),
    Node("p", "10.0.0.11", {"CPU": 16.0, "GPU": 2.0, "antiphon_prefill": 2.0}, 128 << 20),
    Node("d1", "10.0.0.12", {"CPU": 16.0, "GPU": 2.0, "antiphon_decode": 2.0}, 128 << 20),
    Node("d2", "10.0.0.13", {"CPU": 16.0, "GPU": 2.0, "antiphon_decode": 2.0}, 128 << 20),
)


def config(**sections: dict[str, Any]) -> AntiphonConfig:
    """Two prefill and four decode workers; ``sections`` are merged into theirs."""
    document: dict[str, dict[str, Any]] = {
        "prefill": {"replicas": 2, "num_gpus": 1, "resources": {"antiphon_prefill": 1}},
        "decode": {"replicas": 4, "num_gpus": 1, "resources": {"antiphon_decode": 1}},
    }
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    return parse_config(document)


def cluster(**changes: Any) -> ClusterFacts:
    """The cluster, with other facts in place of some."""
    names = [member.name for member in MEMBERS]
    facts = ClusterFacts(
        config=config(),
        here=VERSIONS,
        members=MEMBERS,
        versions=dict.fromkeys(names, VERSIONS),
        nodes={"head": HEAD, **dict.fromkeys(names[1:], GOOD_NODE)},
        failures={},
        paths=tuple(path(a, b) for a in names for b in names if a != b),
        links=tuple(link("p", receiver) for receiver in ("d1", "d2")),
        shape=SHAPE,
    )
    return replace(facts, **changes)


def path(source: str, target: str, **changes: Any) -> PathFacts:
    """A good connection."""
    return replace(PathFacts(source, target, None, 0.0002, 0.0), **changes)


def link(sender: str, receiver: str, **changes: Any) -> LinkFacts:
    """A good link."""
    return replace(LinkFacts("gloo", sender, receiver, None, 0.004, 0.0002, 3e9), **changes)


def with_node(name: str, **changes: Any) -> ClusterFacts:
    """The cluster, with something else found on one node."""
    facts = cluster()
    return replace(facts, nodes={**facts.nodes, name: replace(facts.nodes[name], **changes)})


def with_member(name: str, **changes: Any) -> ClusterFacts:
    """The cluster, with other things offered by one node."""
    return cluster(members=tuple(replace(m, **changes) if m.name == name else m for m in MEMBERS))
