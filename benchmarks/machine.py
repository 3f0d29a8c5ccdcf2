"""What a figure was measured on, printed beside it."""

import importlib.metadata
import os
import platform
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, load and versions."""
    packages = ("antiphon", "torch", "transformers", "ray")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_gib:.0f} GiB",
        "load at start": f"{os.getloadavg()[0]:.2f}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
