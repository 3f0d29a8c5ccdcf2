"""How nodes of Ray are named, and addresses where no cluster is."""

import time
from typing import Any

import pytest

from antiphon.deployment.doctor.ray_agents import agents_of, members
from antiphon.errors import ConfigError


def node(node_id: str, address: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": node_id, "NodeManagerAddress": address, "Resources": resources}


def test_nodes_that_share_an_address_are_told_apart() -> None:
    nodes = [node("aaaaaaaa", "10.0.0.1"), node("bbbbbbbb", "10.0.0.1"), node("cc", "10.0.0.2")]
    assert [m.name for m in members(nodes)] == ["10.0.0.1#aaaaaa", "10.0.0.1#bbbbbb", "10.0.0.2"]


def test_resources_are_those_that_workers_are_placed_by() -> None:
    offered = {
        "CPU": 4.0, "GPU": 1.0, "antiphon_decode": 1.0, "memory": 1e9, "node:10.0.0.1": 1.0,
        "node:__internal_head__": 1.0, "accelerator_type:H100": 1.0, "object_store_memory": 9e7,
    }  # fmt: skip
    (member,) = members([node("a", "10.0.0.1", **offered)])
    assert member.resources == {"CPU": 4.0, "GPU": 1.0, "antiphon_decode": 1.0}
    assert member.object_store_bytes == 90_000_000


@pytest.mark.parametrize("address", ["127.0.0.1:9", "local", "nonsense"])
def test_without_a_cluster_nothing_is_waited_for(address: str) -> None:
    started_at = time.monotonic()
    with pytest.raises(ConfigError, match=f"cannot join a Ray cluster at {address}: "):
        agents_of(address).__enter__()
    assert time.monotonic() - started_at < 10
