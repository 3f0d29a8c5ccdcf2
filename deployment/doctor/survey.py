"""Asks every node, in steps that are each bounded in time, and gathers what they say.

    versions   of every node; one that does not answer, or has another antiphon, is asked no more
    look       each node at itself
    reach      each node at a fresh port of each other one
    shape      one node that has the model: what it costs
    links      each pair of a node that can prefill and one that can decode

Links are measured in rounds in which a node is part of one link only, so they do not share its
network. What the time limit leaves no room for is reported as such.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from antiphon.config import AntiphonConfig
from antiphon.deployment.doctor.agent import read_versions
from antiphon.deployment.doctor.facts import (
    OUT_OF_TIME,
    ClusterFacts,
    LinkFacts,
    Node,
    NodeFacts,
    PathFacts,
)
from antiphon.deployment.doctor.pairs import Pair, diagonals, rounds
from antiphon.deployment.doctor.placement import nodes_for

_VERSIONS_SECONDS = 60.0  # Ray starts a process on each node
_LOOK_SECONDS = 60.0  # torch is imported
_REACH_SECONDS = 20.0
_SHAPE_SECONDS = 60.0  # so is transformers
_LINK_SECONDS = 40.0  # for a link that is slow in each of its steps


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node did not answer a call."""

    reason: str


Call = tuple[str, tuple[Any, ...]]


class Agents(Protocol):
    """An ``Agent`` on each node."""

    members: tuple[Node, ...]

    def call(self, calls: Mapping[str, Call], timeout_seconds: float) -> dict[str, Any]:
        """Call a method of each named node's agent, all at once.

        Returns:
            For each name what its agent returned, or a ``Failure``; after the time at the latest.
        """


class Survey:
    """One look at a cluster.

    Args:
        agents: To ask.
        config: That is to be deployed; its ``http`` is where the endpoint will listen.
        time_limit_seconds: For everything.
        report: Called with one line before each step.
    """

    def __init__(
        self,
        agents: Agents,
        config: AntiphonConfig,
        time_limit_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        self._agents = agents
        self._config = config
        self._deadline = time.monotonic() + time_limit_seconds
        self._report = report
        self._failures: dict[str, str] = {}

    def run(self) -> ClusterFacts:
        """Gather everything."""
        here = read_versions()
        names = [node.name for node in self._agents.members]
        self._report(f"asking {len(names)} node(s) for versions")
        asked = self._ask(dict.fromkeys(names, ("versions", ())), _VERSIONS_SECONDS)
        versions: dict[str, Mapping[str, str | None]] = self._keep(asked)
        equal = [name for name in versions if versions[name]["antiphon"] == here["antiphon"]]
        nodes = self._look(equal)
        paths = self._reach(nodes)
        shape, shape_error = self._shape(nodes)
        return ClusterFacts(
            config=self._config,
            here=here,
            members=self._agents.members,
            versions=versions,
            nodes=nodes,
            failures=self._failures,
            paths=paths,
            links=self._links(nodes, paths),
            shape=shape,
            shape_error=shape_error,
        )

    def _look(self, names: Iterable[str]) -> dict[str, NodeFacts]:
        self._report("looking at each node")
        http = self._config.http
        arguments = (self._config.model.source, http.host, http.port)
        return self._keep(self._call(dict.fromkeys(names, ("look", arguments)), _LOOK_SECONDS))

    def _reach(self, names: Iterable[str]) -> tuple[PathFacts, ...]:
        self._report("connecting nodes to each other")
        listening = self._call(dict.fromkeys(names, ("listen", ())), _REACH_SECONDS)
        ports = self._keep(listening)
        calls = {
            source: ("reach", (source, {name: ports[name] for name in ports if name != source}))
            for source in ports
        }
        found = self._keep(self._call(calls, _REACH_SECONDS))
        return tuple(path for paths in found.values() for path in paths)

    def _shape(self, nodes: Mapping[str, NodeFacts]) -> tuple[Any, str | None]:
        ready = [name for name, facts in nodes.items() if facts.model.fingerprint is not None]
        if not ready:
            return None, None
        self._report("counting what the model needs")
        source = self._config.model.source
        (answer,) = self._call({ready[0]: ("shape", (source,))}, _SHAPE_SECONDS).values()
        return (None, answer.reason) if isinstance(answer, Failure) else (answer, None)

    def _links(
        self, nodes: Mapping[str, NodeFacts], paths: Sequence[PathFacts]
    ) -> tuple[LinkFacts, ...]:
        cut = {(path.source, path.target) for path in paths if path.error is not None}
        known = [
            node
            for node in self._agents.members
            if node.name in nodes and node.name not in self._failures
        ]
        pairs = [
            Pair(transport, sender.name, receiver.name)
            for transport in self._transports()
            for sender, receiver in diagonals(
                nodes_for(self._config, "prefill", known), nodes_for(self._config, "decode", known)
            )
            if (sender.name, receiver.name) not in cut
            and not (transport == "nccl" and sender == receiver)
        ]
        self._report(f"measuring {len(pairs)} link(s)")
        return tuple(link for group in rounds(pairs) for link in self._measure(group))

    def _transports(self) -> tuple[str, ...]:
        """Headers cross over gloo, whatever carries KV."""
        return ("gloo", "nccl") if self._config.handoff.transport == "nccl" else ("gloo",)

    def _measure(self, pairs: Sequence[Pair]) -> list[LinkFacts]:
        ids = {pair: uuid.uuid4().hex for pair in pairs}
        accepting = self._call(
            {pair.receiver: ("accept_link", (pair.transport, ids[pair])) for pair in pairs},
            _LINK_SECONDS,
        )
        calls = {
            pair.sender: (
                "measure_link",
                (pair.transport, accepting[pair.receiver], ids[pair]),
            )
            for pair in pairs
            if not isinstance(accepting[pair.receiver], Failure)
        }
        answers = self._call(calls, _LINK_SECONDS)
        return [_link(pair, answers.get(pair.sender, accepting[pair.receiver])) for pair in pairs]

    def _call(self, calls: Mapping[str, Call], timeout_seconds: float) -> dict[str, Any]:
        """Call methods of examiners."""
        inner = {name: ("call", (method, arguments)) for name, (method, arguments) in calls.items()}
        return self._ask(inner, timeout_seconds)

    def _ask(self, calls: Mapping[str, Call], timeout_seconds: float) -> dict[str, Any]:
        seconds = min(timeout_seconds, self._deadline - time.monotonic())
        if seconds <= 0:
            return dict.fromkeys(calls, Failure(OUT_OF_TIME))
        return self._agents.call(calls, seconds)

    def _keep(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out, and note, whoever did not answer."""
        for name, answer in answers.items():
            if isinstance(answer, Failure):
                self._failures.setdefault(name, answer.reason)
        return {n: answer for n, answer in answers.items() if not isinstance(answer, Failure)}


def _link(pair: Pair, answer: Any) -> LinkFacts:
    if isinstance(answer, Failure):
        return LinkFacts(pair.transport, pair.sender, pair.receiver, answer.reason)
    return LinkFacts(pair.transport, pair.sender, pair.receiver, None, *answer)
