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
    """One Ray node."""

    name: str  # see the module
    address: str  # that Ray, and our workers, are reached at
    resources: Mapping[str, float]  # CPU, GPU and custom ones that it offers, in use or not
    object_store_bytes: int  # of memory that Ray takes in /dev/shm


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One device; the architecture is named as in the table of tuned kernels."""

    name: str
    architecture: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model's files on one node."""

    fingerprint: str | None = None  # of a model that is ready
    error: str | None = None  # why it is not
    is_to_be_made: bool = False  # a worker that starts would convert or download it


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, seen from inside."""

    unmet: tuple[str, ...]  # of the package's requirements, each as "torch is 2.1, wanted ==2.13"
    nccl: str | None  # its version, where torch was built with it
    gpus: tuple[GpuFacts, ...]
    gpu_error: str | None  # why torch cannot use GPUs that the system has
    cores: float  # that processes may use; limits of the pod count
    memory_bytes: int  # of the machine or, if that is less, of the pod
    free_bytes: int  # of them available
    shared_memory_bytes: int  # size of /dev/shm
    max_open_files: int  # of one process
    wait_policy: str | None  # OMP_WAIT_POLICY, where it is set
    http_error: str | None  # why the HTTP port cannot be listened on
    model: ModelFacts


@dataclass(frozen=True, slots=True)
class PathFacts:
    """Connections to a fresh port of one node from another."""

    source: str
    target: str
    error: str | None = None  # why there is none; the rest is 0 then
    round_trip_seconds: float = 0.0  # the shortest
    clock_offset_seconds: float = 0.0  # target's clock ahead, give or take half a round trip

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """A link as workers make it between a node that can prefill and one that can decode."""

    transport: str
    sender: str
    receiver: str
    error: str | None = None  # why there is none; the rest is 0 then
    setup_seconds: float = 0.0  # until both ends had it
    round_trip_seconds: float = 0.0  # of a message of 8 bytes and its answer; the median
    bytes_per_second: float = 0.0  # between hosts' memory over gloo, between GPUs over nccl

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.sender} -> {self.receiver} ({self.transport})"


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Everything that was found out."""

    config: AntiphonConfig
    here: Mapping[str, str | None]  # versions of packages where the command runs
    members: tuple[Node, ...]
    versions: Mapping[str, Mapping[str, str | None]]  # the same by node, of all that answered
    nodes: Mapping[str, NodeFacts]  # by name; who is in neither this nor failures was not asked
    failures: Mapping[str, str]  # why a node told nothing, by name
    paths: tuple[PathFacts, ...]
    links: tuple[LinkFacts, ...]
    shape: ModelShape | None  # what the model costs; None if nobody could tell
    shape_error: str | None = None  # why


class Severity(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"  # it will not work, or not as configured
    WARNING = "warning"  # it will, but worse or later than it could


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to mend."""

    where: str  # a node, a pair of them, or the cluster
    found: str
    wanted: str
    mend: str
    severity: Severity = Severity.PROBLEM
    check: str = ""  # which one failed; written by ``diagnose``
