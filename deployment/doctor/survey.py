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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from antiphon.deployment.doctor.placement import nodes_for

_SECONDS = {
    "versions": 60.0,  # Ray starts a process on each node
    "look": 60.0,  # torch is imported
    "listen": 20.0,
    "reach": 20.0,
    "shape": 60.0,  # transformers is imported
    "accept_link": 40.0,
    "measure_link": 40.0,  # for a link that is slow in each of its steps
}

Pair = tuple[str, str]  # names of the sending and the receiving node of a link
Arguments = Mapping[str, tuple[Any, ...]]  # by name of the node


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node did not answer a call."""

    reason: str

    @classmethod
    def late(cls, seconds: float) -> "Failure":
        """It takes too long."""
        return cls(f"no answer within {seconds:.0f} s")


class Agents(Protocol):
    """An ``Agent`` on each node."""

    members: tuple[Node, ...]

    def call(self, method: str, arguments: Arguments, timeout_seconds: float) -> dict[str, Any]:
        """Call a method of each named node's agent, all at once, each with its arguments.

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
        here, members = read_versions(), self._agents.members
        self._report(f"asking {len(members)} node(s) for versions")
        versions = self._ask("versions", {node.name: () for node in members})
        self._report("looking at each node")
        model, http = self._config.model, self._config.http
        equal = [name for name in versions if versions[name]["antiphon"] == here["antiphon"]]
        nodes = self._ask("look", dict.fromkeys(equal, (model.source, http.host, http.port)))
        paths = self._reach(nodes)
        shape, shape_error = self._shape(nodes)
        return ClusterFacts(
            config=self._config,
            here=here,
            members=members,
            versions=versions,
            nodes=nodes,
            failures=self._failures,
            paths=paths,
            links=tuple(self._links(nodes, paths)),
            shape=shape,
            shape_error=shape_error,
        )

    def _reach(self, names: Iterable[str]) -> tuple[PathFacts, ...]:
        self._report("connecting nodes to each other")
        ports = self._ask("listen", dict.fromkeys(names, ()))
        others = {name: {n: port for n, port in ports.items() if n != name} for name in ports}
        found = self._ask("reach", {name: (name, others[name]) for name in ports})
        return tuple(path for paths in found.values() for path in paths)

    def _shape(self, nodes: Mapping[str, NodeFacts]) -> tuple[Any, str | None]:
        ready = [name for name, facts in nodes.items() if facts.model.fingerprint is not None]
        if not ready:
            return None, None
        self._report("counting what the model needs")
        (answer,) = self._call("shape", {ready[0]: (self._config.model.source,)}).values()
        return (None, answer.reason) if isinstance(answer, Failure) else (answer, None)

    def _links(
        self, nodes: Mapping[str, NodeFacts], paths: Iterable[PathFacts]
    ) -> Iterator[LinkFacts]:
        names = nodes.keys() - self._failures.keys()
        known = [node for node in self._agents.members if node.name in names]
        senders, receivers = (
            [node.name for node in nodes_for(self._config, role, known)]
            for role in ("prefill", "decode")
        )
        cut = {(path.source, path.target) for path in paths if path.error is not None}
        pairs = [pair for pair in diagonals(senders, receivers) if pair not in cut]
        self._report(f"measuring {len(pairs)} link(s)")
        for group in rounds(pairs):
            yield from self._measure("gloo", group)  # headers cross over it in any case
        if self._config.handoff.transport == "nccl":
            for group in rounds(pair for pair in pairs if pair[0] != pair[1]):
                yield from self._measure("nccl", group)

    def _measure(self, transport: str, pairs: Sequence[Pair]) -> Iterator[LinkFacts]:
        ids = {pair: uuid.uuid4().hex for pair in pairs}
        ends = {receiver: (transport, ids[sender, receiver]) for sender, receiver in pairs}
        accepting = self._call("accept_link", ends)
        arguments = {
            sender: (transport, accepting[receiver], ids[sender, receiver])
            for sender, receiver in pairs
            if not isinstance(accepting[receiver], Failure)
        }
        answers = self._call("measure_link", arguments)
        for sender, receiver in pairs:
            answer = answers.get(sender, accepting[receiver])
            measured = (answer.reason,) if isinstance(answer, Failure) else (None, *answer)
            yield LinkFacts(transport, sender, receiver, *measured)

    def _ask(self, method: str, arguments: Arguments) -> dict[str, Any]:
        """Call; leave out, and note, whoever did not answer."""
        answers = self._call(method, arguments)
        for name, answer in answers.items():
            if isinstance(answer, Failure):
                self._failures.setdefault(name, answer.reason)
        return {n: answer for n, answer in answers.items() if not isinstance(answer, Failure)}

    def _call(self, method: str, arguments: Arguments) -> dict[str, Any]:
        seconds = min(_SECONDS[method], self._deadline - time.monotonic())
        if seconds <= 0:
            return dict.fromkeys(arguments, Failure(OUT_OF_TIME))
        return self._agents.call(method, arguments, seconds) if arguments else {}


def diagonals(senders: Sequence[str], receivers: Sequence[str]) -> list[Pair]:
    """Every pair, ordered so that neighbours in the list have different ends."""
    if not senders or not receivers:
        return []
    length = range(max(len(senders), len(receivers)))
    ends = ((index, index + shift) for shift in length for index in length)
    pairs = ((senders[i % len(senders)], receivers[j % len(receivers)]) for i, j in ends)
    return list(dict.fromkeys(pairs))


def rounds(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Divide pairs into rounds in which no node occurs twice."""
    divided: list[tuple[set[str], list[Pair]]] = []
    for pair in pairs:
        fitting = (one for one in divided if one[0].isdisjoint(pair))
        if (found := next(fitting, None)) is None:
            divided.append(found := (set(), []))
        found[0].update(pair)
        found[1].append(pair)
    return [group for _, group in divided]
