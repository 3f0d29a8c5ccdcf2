"""Prometheus' own programs: those on the path, or those that ``make prometheus`` has unpacked."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRED = "ANTIPHON_REQUIRE_PROMETHEUS"  # set where nothing may be left out in silence
_UNPACKED = ROOT / "build/prometheus/usr/bin"


def binary(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``; without one the test is skipped or, in CI, fails."""
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    if found is not None:
        return found
    reason = f"no {name} here: `make prometheus` gets it on Debian, or install it"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason}; {REQUIRED} is set", pytrace=False)
    pytest.skip(reason)
