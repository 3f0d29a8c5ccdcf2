"""A quarter of a minute of what ``make soak`` does for ten."""

import asyncio
from pathlib import Path

import pytest
from soak import soak

pytestmark = pytest.mark.e2e
SECONDS = 16.0


def test_a_short_soak_violates_nothing(tmp_path: Path) -> None:
    violations = asyncio.run(soak(tmp_path, SECONDS, seed=1, log=tmp_path / "log"))
    assert not violations, "\n".join(violations)
