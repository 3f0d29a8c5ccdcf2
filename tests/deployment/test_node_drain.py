"""Which node ``antiphon drain`` takes for its own; tests/e2e/test_chart.py drains one."""

import socket
import time

import pytest
from ray._private import services
from ray.exceptions import RaySystemError

from antiphon.deployment import node_drain
from antiphon.deployment.node_drain import _node_here, drain_node
from antiphon.errors import ConfigError

ADDRESS = "127.0.0.1:6379"


def node(name: str, host: str, *, alive: bool = True) -> dict[str, object]:
    return {"NodeID": name, "NodeManagerAddress": host, "Alive": alive}


def test_the_node_here_is_the_living_one_with_this_address() -> None:
    host = services.get_node_ip_address(ADDRESS)
    nodes = [node("a", "203.0.113.7"), node("b", host), node("c", host, alive=False)]
    assert _node_here(nodes, ADDRESS) == "b"


@pytest.mark.parametrize(("count", "words"), [(0, "0 Ray nodes"), (2, "2 Ray nodes")])
def test_a_node_that_cannot_be_told_is_refused(count: int, words: str) -> None:
    host = services.get_node_ip_address(ADDRESS)
    nodes = [node(str(number), host) for number in range(count)]
    with pytest.raises(ConfigError, match=f"{words} have the address .* name one with --node"):
        _node_here(nodes, ADDRESS)


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that restarts Ray empties itself first, and the cluster may be what is gone."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started_at = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot ask .* at 127\.0\.0\.1:9: nobody"):
        drain_node(None, 60)
    assert time.monotonic() - started_at < 10


def test_a_cluster_that_does_not_let_this_program_in_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: str) -> None:
        raise RaySystemError("Failed to connect to GCS")

    monkeypatch.setattr(node_drain, "_connect", refuse)
    with socket.create_server(("", 0)) as head:  # Ray takes this machine's address for localhost
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"cannot ask .* at .*:\d+: .*connect to GCS"):
            drain_node(None, 60)
