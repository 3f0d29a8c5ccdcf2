"""Facts of imagined clusters: what is found, where, how bad it is, and what is said about it."""

from dataclasses import replace
from typing import Any

import pytest
from imagined_cluster import (
    GB,
    GOOD_NODE,
    H100,
    HEAD,
    MEMBERS,
    VERSIONS,
    cluster,
    config,
    link,
    path,
    with_member,
    with_node,
)

from antiphon.deployment.doctor.diagnosis import CHECKS, diagnose
from antiphon.deployment.doctor.facts import (
    OUT_OF_TIME,
    ClusterFacts,
    Finding,
    GpuFacts,
    ModelFacts,
    Severity,
)

A100 = GpuFacts("A100", "sm_80", 80 * GB, 79 * GB)
ON_CPU: dict[str, Any] = {"num_gpus": 0, "engine": {"device": "cpu"}}
SMALL = GpuFacts("A100", "sm_80", 16 * GB, 16 * GB)


def test_a_good_cluster_has_no_findings() -> None:
    assert diagnose(cluster()) == []


def versions(**changes: str | None) -> dict[str, Any]:
    return {"versions": {**cluster().versions, "d1": {**VERSIONS, **changes}}}


def nccl(**changes: Any) -> ClusterFacts:
    nodes = {**cluster().nodes, "d1": replace(GOOD_NODE, **changes)}
    return cluster(config=config(handoff={"transport": "nccl"}), nodes=nodes)


def clocks(**offsets: float) -> ClusterFacts:
    good = cluster().paths
    return cluster(
        paths=tuple(replace(p, clock_offset_seconds=offsets.get(p.target, 0.0)) for p in good)
    )


# Facts, the check that must fail, where, and words of the finding.
PROBLEMS: dict[str, tuple[ClusterFacts, str, str, str]] = {
    "no node": (cluster(members=(), nodes={}, config=config(prefill={"replicas": 0})),
        "nodes", "cluster", "no living node"),
    "silent": (cluster(failures={"d1": "no answer within 40 s"}), "nodes", "d1", "40 s"),
    "package": (cluster(**versions(torch="2.12.1")), "versions", "d1", "torch 2.12.1"),
    "python": (cluster(**versions(python="3.12.0")), "versions", "d1", "python 3.12.0"),
    "no antiphon": (cluster(**versions(antiphon=None)), "versions", "d1", "antiphon is not inst"),
    "unmet": (with_node("p", unmet=("triton is 3.6, wanted ==3.7.1",)), "versions", "p", "3.6"),
    "nccl": (nccl(nccl="2.21.5"), "versions", "d1", "NCCL 2.21.5"),
    "no room": (cluster(config=config(decode={"replicas": 5})), "placement", "cluster",
        "room for 4 of 5 decode workers; 2 of 4"),
    "no such resource": (cluster(config=config(prefill={"resources": {"fast": 1}})), "placement",
        "cluster", "room for 0 of 2 prefill workers; 0 of 4"),
    "no place for the ingress": (cluster(config=config(http={"resources": {"edge": 0.01}})),
        "placement", "cluster", "room for 0 of 1 of the ingress"),
    "no driver": (with_node("p", gpus=(), gpu_error="too old"), "devices", "p", "too old"),
    "lost GPU": (with_node("p", gpus=(H100,)), "devices", "p", "offers 2 GPU(s), torch finds 1"),
    "unknown GPU": (with_node("p", gpus=(GpuFacts("L40S", "sm_89", 48 * GB, 47 * GB),) * 2),
        "devices", "p", "L40S is sm_89"),
    "model missing": (with_node("d2", model=ModelFacts(error="there is no model")), "model", "d2",
        "there is no model"),
    "other model": (with_node("d2", model=ModelFacts("abd")), "model", "d2", "fingerprint abd"),
    "refused model": (cluster(shape=None, shape_error="bloom"), "model", "cluster", "bloom"),
    "small GPU": (with_node("p", gpus=(SMALL, H100)), "memory", "p", "A100 has 14.90 GiB"),
    "spinning threads": (with_node("p", wait_policy="ACTIVE"), "cores", "p", "threads that wait"),
    "/dev/shm": (with_node("d1", shared_memory_bytes=64 << 20), "shared memory", "d1", "0.06 GiB"),
    "/dev/shm of NCCL": (nccl(shared_memory_bytes=GB), "shared memory", "d1", "/dev/shm of 0.93"),
    "files": (with_node("head", max_open_files=1024), "open files", "head", "a limit of 1024"),
    "port": (with_node("head", http_error="0.0.0.0:8000: in use"), "http port", "head", "in use"),
    "port of metrics": (cluster(config=config(metrics={"first_port": 7990})), "http port",
        "cluster", "port 8000 is one of those at which workers are scraped"),
    "cuda without a GPU": (cluster(config=config(decode={"num_gpus": 0, "engine": {
        "device": "cuda"}})), "devices", "cluster", "decode.engine.device is cuda"),
    "cut off": (cluster(paths=(path("p", "d1", error="10.0.0.12:4711: timed out"),)), "ports",
        "p -> d1", "timed out"),
    "clock": (clocks(d1=-3.0), "clocks", "d1", "-3.000 s"),
    "first clock": (clocks(p=9.0, d1=9.0, d2=9.0), "clocks", "head", "-9.000 s"),
    "broken link": (cluster(links=(link("p", "d1", error="nobody connected"),)), "links",
        "p -> d1 (gloo)", "nobody connected"),
    "no time": (cluster(links=(link("p", "d1", error=OUT_OF_TIME),)), "links", "p -> d1 (gloo)",
        "time limit"),
}  # fmt: skip

WARNINGS: dict[str, tuple[ClusterFacts, str, str, str]] = {
    "model not ready": (
        with_node("d2", model=ModelFacts(error="downloading org/name", is_to_be_made=True)),
        "model", "d2", "downloading"),
    "GPU in use": (with_node("p", gpus=(replace(H100, free_bytes=GB), H100)), "memory", "p",
        "0.93 GiB of a H100 are free"),
    "few cores": (with_node("d1", cores=1.0), "cores", "d1", "1 core(s) for the 2 thread(s)"),
    "slow link": (cluster(links=(link("p", "d1", bytes_per_second=1e8), link("p", "d2"))), "links",
        "p -> d1 (gloo)", "0.10 GB/s"),
    "clock": (clocks(d1=0.2), "clocks", "d1", "+0.200 s"),
    "unused GPUs": (cluster(config=config(prefill={"num_gpus": 0}, decode={"num_gpus": 0})),
        "devices", "p, d1, d2", "GPUs that no pool reserves"),
    "driver without use": (
        cluster(config=config(prefill=ON_CPU, decode=ON_CPU),
                nodes={**cluster().nodes, "head": replace(HEAD, gpu_error="too old")}),
        "devices", "head", "too old"),
}  # fmt: skip


def only_finding(facts: ClusterFacts, check: str, where: str, words: str) -> Finding:
    (finding,) = diagnose(facts)
    assert (finding.check, finding.where) == (check, where)
    assert words in finding.found
    assert finding.wanted
    assert finding.mend
    return finding


def test_a_node_that_runs_nothing_needs_no_model() -> None:
    facts = with_node("head", model=ModelFacts(error="there is no model"))
    only_finding(facts, "model", "head", "there is no model")  # an ingress may start there
    kept_off = {"resources": {"antiphon_prefill": 0.001}}
    assert diagnose(replace(facts, config=config(prefill={"replicas": 1}, http=kept_off))) == []


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS)
def test_what_will_not_work_is_a_problem(case: tuple[ClusterFacts, str, str, str]) -> None:
    assert only_finding(*case).severity is Severity.PROBLEM


@pytest.mark.parametrize("case", WARNINGS.values(), ids=WARNINGS)
def test_what_works_worse_is_a_warning(case: tuple[ClusterFacts, str, str, str]) -> None:
    assert only_finding(*case).severity is Severity.WARNING


def test_every_check_can_fail() -> None:
    assert {check for _, check, _, _ in PROBLEMS.values()} == set(CHECKS)


GOOD = {
    "round trips are part of the doubt": clocks(d1=0.4),
    "a GPU that no worker uses": with_node("head", gpus=(GpuFacts("T4", "sm_75", GB, GB),)),
    "another NCCL where gloo carries KV": with_node("d1", nccl="2.21.5"),
    "a slow gloo beside NCCL": cluster(
        config=config(handoff={"transport": "nccl"}),
        links=(link("p", "d1", bytes_per_second=1e8), link("p", "d1", transport="nccl")),
    ),
    "int8 on an A100": cluster(
        config=config(decode={"engine": {"kv_cache_dtype": "int8"}}),
        nodes={**cluster().nodes, "d1": replace(GOOD_NODE, gpus=(A100, A100))},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_does_no_harm_is_not_found(name: str) -> None:
    facts = GOOD[name]
    if "doubt" in name:
        facts = replace(facts, paths=tuple(replace(p, round_trip_seconds=0.7) for p in facts.paths))
    assert diagnose(facts) == []


def test_fp8_is_refused_where_the_device_cannot_convert_it() -> None:
    facts = replace(
        with_node("d1", gpus=(A100, A100)),
        config=config(decode={"engine": {"kv_cache_dtype": "fp8"}}),
    )
    only_finding(facts, "devices", "d1", "cannot convert fp8")


def test_the_same_in_several_places_is_said_once() -> None:
    facts = cluster()
    nodes = {name: replace(node, max_open_files=256) for name, node in facts.nodes.items()}
    only_finding(replace(facts, nodes=nodes), "open files", "head, p, d1, d2", "256")


def test_workers_on_a_cpu_need_memory_of_the_host() -> None:
    engine = {"device": "cpu", "kv_cache_bytes": "20GB"}
    on_cpu = config(
        prefill={**ON_CPU, "replicas": 1}, decode={**ON_CPU, "replicas": 1, "engine": engine}
    )
    nodes = {
        **cluster().nodes,
        "p": replace(GOOD_NODE, memory_bytes=30 * GB, free_bytes=30 * GB),  # weights alone are 32
        "d1": replace(GOOD_NODE, free_bytes=50 * GB),  # of 32 + 20 and a process
    }
    findings = diagnose(cluster(config=on_cpu, nodes=nodes))
    seen = {(one.check, one.where, one.severity) for one in findings}
    assert ("memory", "p", Severity.PROBLEM) in seen
    assert ("memory", "d1", Severity.WARNING) in seen
    assert {where for _, where, _ in seen} == {"p", "d1"}


def test_a_node_that_told_nothing_is_not_guessed_about() -> None:
    facts = cluster()
    nodes = {name: node for name, node in facts.nodes.items() if name != "d1"}
    failed = replace(facts, nodes=nodes, failures={"d1": "gone"})
    only_finding(failed, "nodes", "d1", "gone")


def test_members_without_room_for_a_pool_are_named_by_number() -> None:
    facts = with_member("p", resources=MEMBERS[0].resources)
    only_finding(facts, "placement", "cluster", "0 of 4 nodes can hold one")
