"""Agents of several addresses of this machine: real ports, links and files, without Ray."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import save_tiny_model

from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.doctor import machine
from antiphon.deployment.doctor.clock_server import ClockServer, look
from antiphon.deployment.doctor.diagnosis import diagnose
from antiphon.deployment.doctor.facts import OUT_OF_TIME, ClusterFacts, Node
from antiphon.deployment.doctor.local_agents import LocalAgents
from antiphon.deployment.doctor.machine import find_model
from antiphon.deployment.doctor.survey import Arguments, Failure, Survey, diagonals, rounds

PREFILL = Node("p", "127.0.0.2", {"CPU": 1.0, "prefill": 1.0}, 0)
DECODE = Node("d", "127.0.0.3", {"CPU": 1.0, "decode": 1.0}, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", smollm2_path)


@pytest.fixture
def config(model: Path) -> AntiphonConfig:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return parse_config(
        {
            "model": {"source": str(model)},
            "prefill": {"resources": {"prefill": 1}},
            "decode": {"resources": {"decode": 1}},
            "http": {"port": port},
            "router": {"link_bytes_per_second": 1e6},
        }
    )


class SpoiltAgents(LocalAgents):
    """Agents of which some answers are replaced; None stands for one that never comes."""

    def __init__(self, spoil: Callable[[str, str], Any] | None = None, *more: Node) -> None:
        super().__init__([PREFILL, DECODE, *more])
        self._spoil = spoil

    def call(self, method: str, arguments: Arguments, timeout_seconds: float) -> dict[str, Any]:
        answers = super().call(method, arguments, timeout_seconds)
        spoilt = {name: self._spoil(name, method) for name in arguments} if self._spoil else {}
        return {**answers, **{name: new for name, new in spoilt.items() if new is not None}}


@pytest.fixture
def run(config: AntiphonConfig) -> Iterator[Callable[..., ClusterFacts]]:
    opened: list[LocalAgents] = []

    def survey(agents: LocalAgents, seconds: float = 120.0) -> ClusterFacts:
        opened.append(agents)
        return Survey(agents, config, seconds, lambda line: None).run()

    yield survey
    for agents in opened:
        agents.close()


def found(facts: ClusterFacts) -> set[tuple[str, str]]:
    """Checks that failed, and where; how many cores and open files this machine has is its own."""
    own = ("cores", "open files", "memory")
    return {(one.check, one.where) for one in diagnose(facts) if one.check not in own}


def test_a_good_cluster_is_measured(run: Callable[..., ClusterFacts]) -> None:
    facts = run(SpoiltAgents())
    assert found(facts) == set()
    (link,) = facts.links
    assert (link.transport, link.sender, link.receiver) == ("gloo", "p", "d")
    assert link.error is None
    assert 0 < link.round_trip_seconds < 1
    assert link.bytes_per_second > 1e7
    assert {(path.source, path.target) for path in facts.paths} == {("p", "d"), ("d", "p")}
    assert all(abs(path.clock_offset_seconds) < 0.1 for path in facts.paths)
    assert facts.shape is not None
    assert facts.nodes["p"].memory_bytes >= facts.nodes["p"].free_bytes > 0


def test_a_blocked_port_is_found_and_no_link_is_tried(run: Callable[..., ClusterFacts]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    facts = run(SpoiltAgents(lambda n, method: nobody if (n, method) == ("d", "listen") else None))
    assert found(facts) == {("ports", "p -> d")}
    assert facts.links == ()


def test_a_node_that_does_not_have_its_address_is_found(run: Callable[..., ClusterFacts]) -> None:
    stray = Node("stray", "203.0.113.1", {"CPU": 1.0, "decode": 1.0}, 0)
    facts = run(SpoiltAgents(None, stray))
    assert ("nodes", "stray") in found(facts)
    assert {link.receiver for link in facts.links if link.error is None} == {"d"}


@pytest.mark.parametrize("step", ["versions", "look", "reach", "accept_link", "measure_link"])
def test_a_node_that_falls_silent_is_a_finding(run: Callable[..., ClusterFacts], step: str) -> None:
    who = "p" if step == "measure_link" else "d"
    late = Failure("no answer within 40 s")
    facts = run(SpoiltAgents(lambda n, method: late if (n, method) == (who, step) else None))
    wanted = ("links", "p -> d (gloo)") if step.endswith("link") else ("nodes", who)
    assert found(facts) == {wanted}


def test_another_version_is_asked_no_further(run: Callable[..., ClusterFacts]) -> None:
    other = {"python": "3.11", "antiphon": "9.9"}
    facts = run(SpoiltAgents(lambda n, m: other if (n, m) == ("d", "versions") else None))
    assert "d" not in facts.nodes
    assert ("versions", "d") in found(facts)
    assert not any(check == "nodes" for check, _ in found(facts))


def test_what_the_time_limit_leaves_out_is_said(run: Callable[..., ClusterFacts]) -> None:
    facts = run(SpoiltAgents(), seconds=0.0)
    assert facts.failures == {"p": OUT_OF_TIME, "d": OUT_OF_TIME}


def test_a_call_that_hangs_is_left_behind() -> None:
    agents = LocalAgents([PREFILL])
    goes_on = threading.Event()
    agents._agents["p"].call = lambda *_: goes_on.wait(30)  # type: ignore[method-assign]
    started_at = time.monotonic()
    try:
        (answer,) = agents.call("versions", {"p": ()}, 0.1).values()
        assert answer == Failure("no answer within 0 s")
        assert time.monotonic() - started_at < 2
    finally:
        goes_on.set()


def test_a_listener_that_never_answers_is_bounded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in str(look("a", "b", address, 0.1).error)


def test_a_clock_server_ends_with_its_port() -> None:
    server = ClockServer("127.0.0.1")
    assert look("a", "b", server.address, 1.0).error is None
    server.close()
    assert look("a", "b", server.address, 1.0).error is not None


def test_of_a_pods_limit_what_its_processes_hold_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"memory.max": "8000", "memory.current": "6000", "memory.stat": "anon 5000\n"}
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for files, free in [("", 2000), ("inactive_file 500\n", 2500)]:
        for name, text in {**held, "memory.stat": held["memory.stat"] + files}.items():
            (tmp_path / name).write_text(text)
        assert machine._memory_bytes() == (8000, free)
    (tmp_path / "memory.max").write_text("max\n")
    total, free = machine._memory_bytes()
    assert total > free > 8000


def test_a_model_is_looked_for_and_not_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_model(str(model)).fingerprint
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    facts = find_model(str(gguf))
    assert facts.is_to_be_made
    assert "converting some.gguf" in str(facts.error)
    missing = find_model(str(tmp_path / "none"))
    assert not missing.is_to_be_made
    assert "there is no model" in str(missing.error)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (3, 3), (2, 5), (5, 2), (0, 3)])
def test_every_pair_is_measured_once_and_no_node_twice_at_a_time(
    senders: int, receivers: int
) -> None:
    sending = [f"p{index}" for index in range(senders)]
    receiving = [f"d{index}" for index in range(receivers)]
    wanted = sorted(product(sending, receiving))
    groups = rounds(diagonals(sending, receiving))
    assert sorted(pair for group in groups for pair in group) == wanted
    for group in groups:
        ends = [end for pair in group for end in pair]
        assert len(set(ends)) == len(ends)
    assert len(groups) == (max(senders, receivers) if wanted else 0)


def test_nodes_that_hold_both_pools_are_busy_with_one_link_too() -> None:
    both = [f"n{index}" for index in range(4)]
    groups = rounds(diagonals(both, both))
    assert sum(map(len, groups)) == 16
    for group in groups:
        ends = [end for pair in group for end in set(pair)]
        assert len(set(ends)) == len(ends)
