"""Prometheus' own programs: those on the path, or those that ``make prometheus`` has unpacked."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_UNPACKED = ROOT / "build/prometheus/usr/bin"


def binary(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``; skips the test where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    if found is None:
        pytest.skip(f"no {name} here: `make prometheus` gets it on Debian, or install it")
    return found
