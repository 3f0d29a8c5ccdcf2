"""``antiphon doctor`` on real Ray nodes: good ones are measured, spoilt ones are named.

All nodes are on this machine. A home of its own takes the model away from one, and a folder on the
path of another holds a different version.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
from processes import Product, free_port, wait_for
from tiny_folder import save_tiny_model

pytestmark = pytest.mark.e2e
NODE = {"num_cpus": 1, "object_store_memory": 90 * 2**20}


def other_version(folder: Path) -> Path:
    """A package, which cannot be imported, that Python finds before the installed one."""
    (folder / "antiphon-9.9.dist-info").mkdir(parents=True)
    (folder / "antiphon").mkdir()
    (folder / "antiphon/__init__.py").write_text("raise ImportError('broken')")
    (folder / "antiphon-9.9.dist-info/METADATA").write_text("Name: antiphon\nVersion: 9.9\n")
    return folder


@pytest.fixture
def address(tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of a good node for each pool, and three for decode with a fault each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_tiny_model(tmp_path / "home/tiny", smollm2_path)
    path = f"{other_version(tmp_path / 'other')}:{os.environ.get('PYTHONPATH', '')}"
    decode = {**NODE, "resources": {"decode": 1}}
    options = [
        {**NODE, "resources": {"prefill": 1}},
        decode,
        {**decode, "env_vars": {"HOME": str(tmp_path), "OMP_WAIT_POLICY": "ACTIVE"}},
        {**decode, "env_vars": {"PYTHONPATH": path}},
    ]
    (tmp_path / "cluster").mkdir()
    command = ["python", ray_nodes.__file__, json.dumps(options)]
    running = Product(command, free_port(), tmp_path / "cluster")
    try:
        log = running.log.read_text
        wait_for(lambda: bool(ray_nodes.read_address(log())), 120, log)
        yield ray_nodes.read_address(log())
    finally:
        running.stop()


def test_nodes_are_measured_and_what_is_wrong_with_them_is_named(
    address: str, tmp_path: Path
) -> None:
    (tmp_path / "pools.yaml").write_text(
        json.dumps(
            {
                "model": {"source": "~/tiny"},
                "prefill": {"resources": {"prefill": 1}},
                "decode": {"replicas": 4, "resources": {"decode": 1}},
                "http": {"port": free_port()},
            }
        )
    )
    program = Path(sys.executable).parent / "antiphon"
    answer = subprocess.run(
        [program, "doctor", "--address", "auto", "--config", "pools.yaml", "--json"],
        cwd=tmp_path,
        env=ray_nodes.shell(tmp_path, address),
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert answer.returncode == 1, answer.stdout + answer.stderr
    document: dict[str, Any] = json.loads(answer.stdout)
    names = [node["name"] for node in document["members"]]
    assert len(names) == len(set(names)) == 4
    versions = document["versions"]
    (other,) = (name for name in names if versions[name]["antiphon"] == "9.9")
    policies = {name: facts["wait_policy"] for name, facts in document["nodes"].items()}
    (spoilt,) = (name for name, policy in policies.items() if policy == "ACTIVE")
    found = {(one["check"], one["where"]) for one in document["findings"]}
    assert {
        ("versions", other),
        ("model", spoilt),
        ("cores", spoilt),
        ("placement", "cluster"),
    } <= found
    allowed = {"links", "memory", "open files", "cores"}  # what this machine may be too small for
    assert {check for check, _ in found} <= {"versions", "model", "placement", *allowed}
    (sender,) = (n["name"] for n in document["members"] if "prefill" in n["resources"])
    links = {(link["sender"], link["receiver"]): link for link in document["links"]}
    assert set(links) == {(sender, name) for name in names if name not in (sender, other)}
    assert all(link["error"] is None for link in links.values())
    assert all(link["bytes_per_second"] > 1e7 for link in links.values())
    assert len(document["paths"]) == 6
    assert all(abs(path["clock_offset_seconds"]) < 0.1 for path in document["paths"])
    assert document["failures"] == {}
