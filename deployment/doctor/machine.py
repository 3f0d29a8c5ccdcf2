"""Reads what one machine, or one pod, has: devices, cores, memory, limits, installed packages."""

import importlib.metadata
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from antiphon.deployment.doctor.facts import GpuFacts

_cuda: Any = torch.cuda  # its stubs lack what is used here
_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def unmet_requirements() -> tuple[str, ...]:
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


def nccl_version() -> str | None:
    """Of the NCCL that torch brings."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in _cuda.nccl.version())


def driver_version() -> str | None:
    """Of NVIDIA's kernel module."""
    try:
        found = re.search(r"(\d+\.\d+[.\d]*)", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def num_cores() -> float:
    """Cores that this process may use."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def memory_bytes() -> tuple[int, int]:
    """Memory of the machine or the pod, and what of it is available."""
    text = _read(_MEMINFO)
    total, available = (
        int(re.findall(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)[0]) * 1024
        for name in ("MemTotal", "MemAvailable")
    )
    limit = _read(_CGROUP / "memory.max")
    return (
        (min(total, int(limit)), min(available, int(limit)))
        if limit.isdigit()
        else (
            total,
            available,
        )
    )


def shared_memory_bytes() -> int:
    """Size of /dev/shm, whatever is used of it; 0 if there is none."""
    path = Path("/dev/shm")
    return shutil.disk_usage(path).total if path.is_dir() else 0


def max_open_files() -> int:
    """Descriptors that one process may hold; the soft limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


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


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
