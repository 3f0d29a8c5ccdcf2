"""What is known of a cluster once it was looked at, and what can be wrong with it: plain values.

Nodes are referred to by ``Node.name``: the address that other nodes reach them at, with the start
of Ray's id behind it where several nodes share one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from antiphon.config import AntiphonConfig
from antiphon.workers.model_shape import ModelShape

OUT_OF_TIME = "not tried: the time limit was reached"  # as the error of whatever was left out


@dataclass(frozen=True, slots=True)
class Node:
    """One Ray node.

    Attributes:
        name: See the module.
        address: That Ray, and our workers, are reached at.
        resources: CPU, GPU and custom ones that it offers, in use or not.
        object_store_bytes: Of memory that Ray takes in /dev/shm.
    """

    name: str
    address: str
    resources: Mapping[str, float]
    object_store_bytes: int


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One device; the architecture is named as in the table of tuned kernels."""

    name: str
    architecture: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model's files on one node.

    Attributes:
        fingerprint: Of a model that is ready.
        error: Why it is not.
        is_to_be_made: It is not ready, but a worker that starts would convert or download it.
    """

    fingerprint: str | None = None
    error: str | None = None
    is_to_be_made: bool = False


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, seen from inside.

    Attributes:
        unmet: What the package requires and is not there, each as "torch is 2.1, wanted ==2.13".
        nccl: Its version, where torch was built with it.
        driver: Of the GPUs, if the system names one.
        gpu_error: Why torch cannot use GPUs that the system has.
        cores: That processes may use; limits of the pod count.
        memory_bytes: Of the machine or, if that is less, of the pod.
        free_bytes: Of them available.
        shared_memory_bytes: Size of /dev/shm.
        max_open_files: Of one process.
        wait_policy: ``OMP_WAIT_POLICY``, where it is set.
        http_error: Why the HTTP port cannot be listened on.
    """

    unmet: tuple[str, ...]
    nccl: str | None
    driver: str | None
    gpus: tuple[GpuFacts, ...]
    gpu_error: str | None
    cores: float
    memory_bytes: int
    free_bytes: int
    shared_memory_bytes: int
    max_open_files: int
    wait_policy: str | None
    http_error: str | None
    model: ModelFacts


@dataclass(frozen=True, slots=True)
class PathFacts:
    """Connections to a fresh port of one node from another.

    Attributes:
        error: Why there is none; the rest is 0 then.
        round_trip_seconds: The shortest.
        clock_offset_seconds: By which the target's clock is ahead, give or take half a round trip.
    """

    source: str
    target: str
    error: str | None = None
    round_trip_seconds: float = 0.0
    clock_offset_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """A link as workers make it between a node that can prefill and one that can decode.

    Attributes:
        error: Why there is none; the rest is 0 then.
        setup_seconds: Until both ends had it.
        round_trip_seconds: Of a message of 8 bytes and its answer; the median.
        bytes_per_second: From host memory to host memory over gloo, between GPUs over nccl.
    """

    transport: str
    sender: str
    receiver: str
    error: str | None = None
    setup_seconds: float = 0.0
    round_trip_seconds: float = 0.0
    bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Everything that was found out.

    Attributes:
        here: Versions of packages where the command runs.
        versions: The same by node; of every node that answered.
        nodes: By name; what is in neither this nor ``failures`` was not looked at.
        failures: Why a node told nothing, by name.
        shape: What the model costs; None if nobody could tell.
        shape_error: Why.
    """

    config: AntiphonConfig
    here: Mapping[str, str | None]
    members: tuple[Node, ...]
    versions: Mapping[str, Mapping[str, str | None]]
    nodes: Mapping[str, NodeFacts]
    failures: Mapping[str, str]
    paths: tuple[PathFacts, ...]
    links: tuple[LinkFacts, ...]
    shape: ModelShape | None
    shape_error: str | None = None


class Severity(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"  # it will not work, or not as configured
    WARNING = "warning"  # it will, but worse or later than it could


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to mend.

    Attributes:
        check: Which check failed.
        where: A node, a pair of them, or the cluster.
    """

    check: str
    where: str
    found: str
    wanted: str
    mend: str
    severity: Severity = Severity.PROBLEM
