"""Reads what one machine, or one pod, has: packages, devices, memory, limits, port and model."""

import importlib.metadata
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from antiphon.deployment.doctor.facts import GpuFacts, ModelFacts, NodeFacts
from antiphon.deployment.endpoint import serve_listen_error
from antiphon.errors import ConfigError
from antiphon.workers.model_files import fingerprint
from antiphon.workers.model_source import resolve_model

_cuda: Any = torch.cuda  # its stubs lack what is used here
_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_CGROUP = Path("/sys/fs/cgroup")
_SHARED_MEMORY = Path("/dev/shm")


def look_around(source: str, http_host: str, http_port: int) -> NodeFacts:
    """Everything about this machine alone.

    Args:
        source: Of the model.
        http_host: That the endpoint will listen on.
        http_port: The same.
    """
    gpus, gpu_error = read_gpus()
    total, free = _memory_bytes()
    has_shm = _SHARED_MEMORY.is_dir()
    return NodeFacts(
        unmet=_unmet_requirements(),
        nccl=_nccl_version(),
        gpus=gpus,
        gpu_error=gpu_error,
        cores=_num_cores(),
        memory_bytes=total,
        free_bytes=free,
        shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).total if has_shm else 0,
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        http_error=serve_listen_error(http_host, http_port),
        model=find_model(source),
    )


def _unmet_requirements() -> tuple[str, ...]:
    """What the installed package requires, extras aside, and is missing or another version."""
    problems = []
    for text in importlib.metadata.requires("antiphon") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{wanted.name} is missing, wanted {wanted.specifier}")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            problems.append(f"{wanted.name} is {found}, wanted {wanted.specifier}")
    return tuple(problems)


def read_gpus() -> tuple[tuple[GpuFacts, ...], str | None]:
    """The GPUs that torch can use, and why it cannot use those that the system has."""
    if not torch.cuda.is_available():
        return (), _why_none() if any(path.exists() for path in _DEVICES) else None
    try:
        return tuple(_gpu(index) for index in range(torch.cuda.device_count())), None
    except RuntimeError as error:
        return (), str(error).partition("\n")[0]


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without support for GPUs"
    try:
        _cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "torch finds none of them"


def _gpu(index: int) -> GpuFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    free, total = torch.cuda.mem_get_info(index)
    return GpuFacts(properties.name, architecture, total, free)


def _nccl_version() -> str | None:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in _cuda.nccl.version())


def _num_cores() -> float:
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _memory_bytes() -> tuple[int, int]:
    """Memory of the machine or the pod, and what of it is available.

    Of a pod's limit all that its processes hold is gone, but for files that can be read again.
    """
    lines = re.findall(r"^Mem(?:Total|Available): +(\d+) kB$", _read(Path("/proc/meminfo")), re.M)
    total, available = (int(kilobytes) * 1024 for kilobytes in lines)
    text = _read(_CGROUP / "memory.max")
    if not text.isdigit():
        return total, available
    limit, used = int(text), int(_read(_CGROUP / "memory.current") or 0)
    files = re.search(r"^inactive_file (\d+)$", _read(_CGROUP / "memory.stat"), re.M)
    left = limit - used + (int(files[1]) if files else 0)
    return min(total, limit), max(0, min(available, left))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class _NotReadyError(Exception):
    """The model would have to be made first."""


def find_model(source: str) -> ModelFacts:
    """Look for a model as a worker does when it starts, but neither convert nor download it."""

    def stop(before: str) -> None:
        raise _NotReadyError(before)

    try:
        return ModelFacts(fingerprint(resolve_model(source, stop)))
    except _NotReadyError as error:
        return ModelFacts(error=f"not ready: a worker would begin with {error}", is_to_be_made=True)
    except ConfigError as error:
        return ModelFacts(error=str(error))
