"""Joining a Ray cluster that is not there: said at once, where Ray would try for minutes."""

import time
from pathlib import Path

import pytest

from antiphon.deployment.launcher import _join
from antiphon.deployment.ray_address import reachable_head
from antiphon.errors import ConfigError

NOBODY = "127.0.0.1:9"


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Ray notes the cluster that was last started on a machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray/ray_current_cluster"


@pytest.mark.parametrize("address", ["auto", NOBODY])
def test_a_cluster_that_has_ended_is_not_waited_for(note: Path, address: str) -> None:
    note.write_text(NOBODY)
    started_at = time.monotonic()
    with pytest.raises(
        ConfigError, match=f"cannot join a Ray cluster at {address}: nobody answers at .*:9: "
    ):
        _join(address)
    assert time.monotonic() - started_at < 10


def test_the_variable_is_stronger_than_the_note(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note.write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    with pytest.raises(OSError, match=r"nobody answers at .*:9: "):
        reachable_head("auto")


@pytest.mark.parametrize("address", ["local", "nonsense"])
def test_what_is_no_address_is_refused(note: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot join a Ray cluster at {address}: "):
        _join(address)
