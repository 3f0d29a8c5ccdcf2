"""docs/deploy.md and the files it explains are what Ray, Serve and this program accept."""

import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_commands import ROOT, blocks, check, commands

from antiphon.config_loading import parse_config
from antiphon.messages import Role

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli as ray_command
    from ray.serve.schema import ServeDeploySchema

PAGES = [
    ROOT / name
    for name in (
        "docs/deploy.md",
        "docs/configuration.md",
        "docs/monitoring.md",
        "docs/runbooks.md",
        "helm/antiphon/README.md",
    )
]
CLUSTER = ROOT / "deployment/ray-cluster.yaml"
COMMANDS = [words for page in PAGES for words in commands(page.read_text())]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_known(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_uses_the_name_of_a_release_twice(page: Path) -> None:
    assert all(block.count("helm install") <= 1 for block in blocks(page.read_text(), "bash"))


def test_the_examples_of_configurations_are_valid() -> None:
    documents = [yaml.safe_load(block) for block in blocks(PAGES[0].read_text(), "yaml")]
    assert documents
    for document in documents:
        for application in ServeDeploySchema.model_validate(document).applications:
            parse_config(application.args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), target
        text = linked.read_text() if anchor else ""
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        anchors |= set(re.findall(r'^<a id="(\w+)"></a>$', text, re.MULTILINE))
        assert not anchor or anchor in anchors, target


def test_what_kuberay_does_not_take_over_at_once_is_not_promised() -> None:
    """It compares clusters without numbers of pods, and leaves a Service that exists as it is."""
    rows = [line.split("|")[1:3] for line in PAGES[0].read_text().splitlines() if line[:1] == "|"]
    effects = {what.strip(): effect.strip() for what, effect in rows}
    (at_once,) = [what for what, effect in effects.items() if effect.startswith("Applied at once")]
    assert "service" not in at_once.lower()
    assert effects["`service.type`"].startswith("Nothing, until")
    (another,) = [what for what, effect in effects.items() if "second cluster" in effect]
    assert "`maxPods`" in another


def start_commands() -> dict[str, list[str]]:
    config: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return {kind: config[f"{kind}_start_ray_commands"] for kind in ("head", "worker")}


@pytest.mark.parametrize("page", [ROOT / "README.md", PAGES[0]], ids=lambda page: page.name)
def test_the_cluster_offers_what_the_examples_for_serve_ask_for(page: Path) -> None:
    starts = re.findall(r'\\"(antiphon_[^"]+)\\"', "\n".join(start_commands()["worker"]))
    pool = "$(cat /etc/antiphon/pool)"
    offered = {name.replace(pool, role) for name in starts for role in Role}
    for document in (yaml.safe_load(block) for block in blocks(page.read_text(), "yaml")):
        for application in document.get("applications", ()):
            sections = application["args"].values()
            asked = {name for section in sections for name in section.get("resources", ())}
            assert asked
            assert asked <= offered


def test_ray_accepts_the_cluster() -> None:
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_nodes_start_with_options_that_ray_has(kind: str, tmp_path: Path) -> None:
    """The shell reads the commands; programs that print how they are called stand in for Ray's."""
    (tmp_path / "pool").write_text("decode\n")
    (tmp_path / "workers").write_text("4\n")
    for name in ("ray", "antiphon"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\nprintf "%s\\0" "$RAY_AUTH_MODE" "$@"; echo\n')
        program.chmod(0o755)
    script = "\n".join(start_commands()[kind])
    script = script.replace("/opt/antiphon/bin", str(tmp_path)).replace(
        "/etc/antiphon", str(tmp_path)
    )
    answer = subprocess.run(
        ["bash", "-uc", script],
        env={"RAY_HEAD_IP": "10.0.0.10", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    calls = [line.rstrip("\0").split("\0") for line in answer.stdout.splitlines()]
    modes = {command: mode for mode, command, *_ in calls}
    assert modes.pop("stop") == ""  # which asks nobody
    assert modes == dict.fromkeys({"head": ["start"], "worker": ["drain", "start"]}[kind], "token")
    (options,) = [call[2:] for call in calls if call[1] == "start"]
    parsed = ray_command.commands["start"].make_context("ray", list(options)).params
    if kind == "head":
        assert "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES=0" in script, "an update would stop for good"
        assert (parsed["head"], parsed["num_cpus"], parsed["num_gpus"]) == (True, 0, 0)
    else:
        assert parsed["address"] == "10.0.0.10:6379"
        assert yaml.safe_load(parsed["resources"]) == {
            "antiphon_decode": 4,
            "antiphon_ingress": 1,
        }
