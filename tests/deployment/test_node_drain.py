"""Which node ``antiphon drain`` takes for its own; tests/e2e/test_chart.py drains one."""

import pytest
from ray._private import services

from antiphon.deployment.node_drain import _node_here
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
