"""Agents in this process: of this machine alone, without Ray."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from antiphon.config import AntiphonConfig
from antiphon.deployment.doctor.agent import Agent
from antiphon.deployment.doctor.facts import Node
from antiphon.deployment.doctor.survey import Arguments, Failure
from antiphon.deployment.local_machine import OBJECT_STORE_BYTES, local_cpus


def this_machine(config: AntiphonConfig) -> Node:
    """The node that ``antiphon serve`` would start."""
    import ray

    from antiphon.deployment.doctor.machine import read_gpus

    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    resources = {"CPU": float(local_cpus(config)), "GPU": float(len(read_gpus()[0]))}
    return Node(address, address, resources, OBJECT_STORE_BYTES)


class LocalAgents:
    """See ``Agents``.

    Args:
        members: Each with an address of this machine.
    """

    def __init__(self, members: Sequence[Node]) -> None:
        self.members = tuple(members)
        self._agents = {node.name: Agent(node.address) for node in members}

    def call(self, method: str, arguments: Arguments, timeout_seconds: float) -> dict[str, Any]:
        """See ``Agents.call``; a call that does not end is left behind."""
        answers: dict[str, Any] = {}

        def answer(name: str) -> None:
            try:
                answers[name] = self._agents[name].call(method, arguments[name])
            except Exception as error:  # whatever fails there is a finding here
                answers[name] = Failure(f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=answer, args=(n,), daemon=True) for n in arguments]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = Failure.late(timeout_seconds)
        return {name: answers.get(name, late) for name in arguments}

    def close(self) -> None:
        """Close what the agents opened."""
        for agent in self._agents.values():
            agent.close()
