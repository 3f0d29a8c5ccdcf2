"""Joining a Ray cluster: who is not there is named at once, and who may be told the token."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services
from ray.exceptions import AuthenticationError

from antiphon.deployment.existing_cluster import join
from antiphon.deployment.ray_address import reachable_head
from antiphon.errors import ConfigError

NOBODY = "127.0.0.1:9"


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Ray notes the cluster that was last started on a machine.

    What runs beside these tests is not found: Ray would take it if it were the only one.
    """
    monkeypatch.setattr(services, "find_gcs_addresses", set)
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
        join(address)
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
        join(address)


@pytest.fixture
def head() -> Iterator[str]:
    """The address of somebody who lets himself be connected to, and says nothing.

    On every interface: Ray takes this machine's address in place of localhost.
    """
    with socket.create_server(("", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_wants_a_token_is_no_traceback(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=f"cannot join a Ray cluster at {head}: no token"):
        join(head)


def test_only_the_cluster_that_ray_noted_here_is_told_the_token(note: Path, head: str) -> None:
    """In a process of its own, since Ray keeps the mode until the end of one."""
    note.write_text(head)
    home = note.parent / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("0123456789abcdef")
    program = (
        "import os; from antiphon.deployment.ray_address import reachable_head; "
        "from ray._private.authentication.authentication_utils import is_token_auth_enabled\n"
        "def ask(address): reachable_head(address); print(is_token_auth_enabled())\n"
        f"ask({head!r}); os.environ['RAY_ADDRESS'] = {head!r}; ask('auto')\n"
        "del os.environ['RAY_ADDRESS']; ask('auto')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout.split() == ["False", "False", "True"]
