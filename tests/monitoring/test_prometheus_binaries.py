"""Where Prometheus is not to be had: its tests say so, and fail where it is required."""

import os
import shutil
import subprocess
from pathlib import Path

import prometheus_binaries
import pytest
from prometheus_binaries import REQUIRED, ROOT, binary


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prometheus_binaries, "_UNPACKED", tmp_path)
    monkeypatch.delenv(REQUIRED, raising=False)
    return tmp_path


def test_a_test_is_skipped_and_says_why(nowhere: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="no promtool here: `make prometheus` gets it"):
        binary("promtool")


def test_where_it_is_required_a_test_fails(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=f"no promtool here.*{REQUIRED} is set"):
        binary("promtool")


@pytest.mark.parametrize(("required", "status"), [("", 0), ("1", 1)])
def test_the_script_that_gets_it_fails_where_it_is_required(
    tmp_path: Path, required: str, status: int
) -> None:
    script = tmp_path / "tests/support/get_prometheus.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests/support/get_prometheus.sh", script)
    programs = tmp_path / "bin"  # all that it needs but apt
    programs.mkdir()
    for name in ("bash", "dirname", "mkdir", "rm"):
        (programs / name).symlink_to(shutil.which(name) or name)
    environ = {**os.environ, "PATH": str(programs), REQUIRED: required}
    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=20)
    assert done.returncode == status, done.stderr
    assert "no Prometheus" in done.stderr
