"""What can be wrong with a node by itself: facts in, findings out."""

from collections.abc import Iterator

from antiphon.config import PoolConfig
from antiphon.deployment.capacity_model import ITEM_BYTES, kv_bytes_per_token
from antiphon.deployment.doctor.facts import ClusterFacts, Finding, NodeFacts, Severity
from antiphon.deployment.doctor.placement import nodes_for, place
from antiphon.deployment.gpus import TUNED

GIB = 2**30
# Of a GPU for the driver's context and libraries, as in plans; of a host for a process with torch.
_GPU_RUNTIME_BYTES, _HOST_RUNTIME_BYTES = 1.5e9, 0.6e9
# NVIDIA's troubleshooting page of NCCL asks for so much in containers.
_NCCL_SHARED_MEMORY_BYTES = GIB
# An open link holds 7 descriptors at each end, a request one at the proxy and one behind it.
_FILES_PER_LINK, _FILES_PER_REQUEST, _OTHER_FILES = 7, 2, 1024


def check_devices(facts: ClusterFacts) -> Iterator[Finding]:
    """GPUs are there, torch can use them, and kernels were made for them."""
    wants_gpus = any(pool.num_gpus for pool in facts.config.pools.values())
    offered = {member.name: member.resources.get("GPU", 0.0) for member in facts.members}
    for name, node in facts.nodes.items():
        if node.gpu_error is not None:
            yield Finding(
                name, node.gpu_error, "that torch can use the node's GPUs",
                "install a driver for the CUDA that torch was built with, and give GPUs to the pod",
                Severity.PROBLEM if wants_gpus else Severity.WARNING,
            )  # fmt: skip
        elif offered[name] > len(node.gpus):
            yield Finding(
                name, f"Ray offers {offered[name]:g} GPU(s), torch finds {len(node.gpus)}",
                "as many GPUs as Ray offers", "start Ray there with the right --num-gpus",
            )  # fmt: skip
    for role, pool in facts.config.pools.items():
        if pool.engine.device == "cuda" and not pool.num_gpus:
            yield Finding(
                "cluster", f"{role}.engine.device is cuda, {role}.num_gpus is 0",
                "a GPU that is reserved for each worker", f"set {role}.num_gpus: 1",
            )  # fmt: skip
        for name, node in _able(facts, role):
            if pool.num_gpus:
                yield from _unsupported(name, role, pool, node)
            elif offered[name] and not wants_gpus and pool.engine.device == "auto":
                yield Finding(
                    name, "Ray offers GPUs that no pool reserves: all workers compute on CPUs",
                    "<pool>.num_gpus, or <pool>.engine.device: cpu where that is meant",
                    "set num_gpus: 1 for the pools that are to have GPUs", Severity.WARNING,
                )  # fmt: skip


def _able(facts: ClusterFacts, role: str) -> Iterator[tuple[str, NodeFacts]]:
    """Nodes that were looked at, and may get a worker of a role."""
    for member in nodes_for(facts.config, role, facts.members):
        if member.name in facts.nodes:
            yield member.name, facts.nodes[member.name]


def _unsupported(name: str, role: str, pool: PoolConfig, node: NodeFacts) -> Iterator[Finding]:
    for gpu, architecture in sorted({(gpu.name, gpu.architecture) for gpu in node.gpus}):
        if architecture not in TUNED:
            yield Finding(
                name, f"{gpu} is {architecture}",
                f"one of {', '.join(sorted(TUNED))}, which kernels were compiled for",
                f"keep {role} workers from this node with {role}.resources",
            )  # fmt: skip
        elif architecture == "sm_80" and pool.engine.kv_cache_dtype == "fp8":
            yield Finding(
                name, f"{gpu} is sm_80, which cannot convert fp8",
                f"a device that can, for {role}.engine.kv_cache_dtype fp8", "use int8",
            )  # fmt: skip


def check_memory(facts: ClusterFacts) -> Iterator[Finding]:
    """Weights and KV of each worker fit where the worker may go."""
    if facts.shape is None:
        return  # the check of the model says why
    for role, pool in facts.config.pools.items():
        on_gpu = pool.num_gpus > 0 and pool.engine.device != "cpu"
        wanted = worker_bytes(facts, role, on_gpu=on_gpu)
        for name, node in _able(facts, role):
            if on_gpu:
                yield from _gpu_memory(role, name, node, wanted)
            elif node.memory_bytes < wanted:
                yield _too_small(role, name, f"memory of {gib(node.memory_bytes)}", wanted)
    yield from _free_host_memory(facts)


def _gpu_memory(role: str, name: str, node: NodeFacts, wanted: float) -> Iterator[Finding]:
    if not node.gpus:
        return
    smallest = min(node.gpus, key=lambda gpu: gpu.memory_bytes)
    fullest = min(node.gpus, key=lambda gpu: gpu.free_bytes)
    if smallest.memory_bytes < wanted:
        yield _too_small(role, name, f"{smallest.name} has {gib(smallest.memory_bytes)}", wanted)
    elif fullest.free_bytes < wanted:
        yield Finding(
            name, f"{gib(fullest.free_bytes)} of a {fullest.name} are free",
            f"{gib(wanted)} for a {role} worker",
            "end what uses the GPU, unless it is the deployment that this one replaces",
            Severity.WARNING,
        )  # fmt: skip


def _free_host_memory(facts: ClusterFacts) -> Iterator[Finding]:
    placed = place(facts.config, facts.members).placed
    for name, node in facts.nodes.items():
        on_host = {
            role: count for role, count in placed[name].items()
            if not facts.config.pools[role].num_gpus
        }  # fmt: skip
        wanted = sum(n * worker_bytes(facts, role, on_gpu=False) for role, n in on_host.items())
        if node.free_bytes < wanted:
            workers = " and ".join(f"{count} {role}" for role, count in on_host.items())
            yield Finding(
                name, f"{gib(node.free_bytes)} are available",
                f"{gib(wanted)} for {workers} worker(s)",
                "end what uses the memory, or give the node fewer workers", Severity.WARNING,
            )  # fmt: skip


def _too_small(role: str, name: str, found: str, wanted: float) -> Finding:
    return Finding(
        name, found, f"{gib(wanted)} for weights, KV and runtime of a {role} worker",
        f"lower {role}.engine.kv_cache_bytes, choose another model, or keep {role} workers from "
        f"this node with {role}.resources",
    )  # fmt: skip


def worker_bytes(facts: ClusterFacts, role: str, *, on_gpu: bool) -> float:
    """Weights, KV and runtime of one worker; of a cache that takes what is left, one block."""
    shape, engine = facts.shape, facts.config.pools[role].engine
    assert shape is not None
    weights: str = facts.config.model.dtype
    if weights == "auto":
        weights = shape.dtype if on_gpu and shape.dtype in ITEM_BYTES else "float32"
    cache = engine.kv_cache_dtype if engine.kv_cache_dtype != "auto" else weights
    kv = engine.kv_cache_bytes or kv_bytes_per_token(shape, cache) * engine.block_size
    runtime = _GPU_RUNTIME_BYTES if on_gpu else _HOST_RUNTIME_BYTES
    return shape.num_parameters * ITEM_BYTES[weights] + kv + runtime


def check_cores(facts: ClusterFacts) -> Iterator[Finding]:
    """Each worker has cores of its own, and waiting threads leave them to others."""
    placed, pools = place(facts.config, facts.members).placed, facts.config.pools
    for name, node in facts.nodes.items():
        threads = sum(pools[role].engine.num_threads * n for role, n in placed[name].items())
        if threads > node.cores:
            yield Finding(
                name, f"{node.cores:g} core(s) for the {threads} thread(s) of its workers",
                "a core for each thread", "give the node fewer workers: each step takes longer",
                Severity.WARNING,
            )  # fmt: skip
        if (node.wait_policy or "").lower() == "active":
            yield Finding(
                name, "OMP_WAIT_POLICY is active: threads that wait use their core",
                "passive, which workers set where nothing is set",
                "start Ray there with OMP_WAIT_POLICY=PASSIVE",
            )  # fmt: skip


def check_shared_memory(facts: ClusterFacts) -> Iterator[Finding]:
    """/dev/shm holds Ray's objects, and what NCCL shares."""
    nccl = _NCCL_SHARED_MEMORY_BYTES if facts.config.handoff.transport == "nccl" else 0
    objects = {member.name: member.object_store_bytes for member in facts.members}
    for name, node in facts.nodes.items():
        wanted = objects[name] + nccl
        if node.shared_memory_bytes < wanted:
            yield Finding(
                name, f"/dev/shm of {gib(node.shared_memory_bytes)}",
                f"{gib(wanted)} for Ray's objects{' and NCCL' if nccl else ''}",
                "mount a larger one (sharedMemory in the chart, --shm-size for containers), or "
                "start Ray with a smaller --object-store-memory",
            )  # fmt: skip


def check_files(facts: ClusterFacts) -> Iterator[Finding]:
    """A process may hold as many descriptors as links and requests can take."""
    links, requests = facts.config.handoff.max_links, facts.config.http.max_concurrent_requests
    wanted = _FILES_PER_LINK * links + _FILES_PER_REQUEST * requests + _OTHER_FILES
    for name, node in facts.nodes.items():
        if node.max_open_files < wanted:
            yield Finding(
                name, f"a limit of {node.max_open_files}", f"{wanted} or more",
                "ulimit -n 65536 before ray start",
            )  # fmt: skip


def check_http(facts: ClusterFacts) -> Iterator[Finding]:
    """The endpoint can listen."""
    for name, node in facts.nodes.items():
        if node.http_error is not None:
            yield Finding(
                name, node.http_error, "a port that is free, or Serve's own",
                "stop what listens there, or choose another port",
            )  # fmt: skip
    http, metrics = facts.config.http, facts.config.metrics
    if http.port in metrics.ports:
        yield Finding(
            "cluster", f"port {http.port} is one of those at which workers are scraped",
            "a port that no worker takes before Serve's proxy does",
            "choose another port, or another metrics.first_port",
        )  # fmt: skip


def gib(num_bytes: float) -> str:
    """Say a size."""
    return f"{num_bytes / GIB:.2f} GiB"
