"""Agents in this process: of this machine alone, without Ray."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.config import AntiphonConfig
from antiphon.deployment.doctor.agent import Agent
from antiphon.deployment.doctor.facts import Node
from antiphon.deployment.doctor.survey import Call, Failure
from antiphon.deployment.launcher import OBJECT_STORE_BYTES


def this_machine(config: AntiphonConfig) -> Node:
    """The node that ``antiphon serve`` would start: as many CPUs as the workers reserve."""
    import ray

    from antiphon.deployment.doctor.machine import read_gpus

    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    reserved = sum(pool.replicas * pool.num_cpus for pool in config.pools.values())
    cpus = max(float(os.cpu_count() or 1), reserved)
    resources = {"CPU": cpus, "GPU": float(len(read_gpus()[0]))}
    return Node(address, address, resources, OBJECT_STORE_BYTES)


class LocalAgents:
    """See ``Agents``.

    Args:
        members: Each with an address of this machine.
    """

    def __init__(self, members: Sequence[Node]) -> None:
        self.members = tuple(members)
        self._agents = {node.name: Agent(node.address) for node in members}

    def call(self, calls: Mapping[str, Call], timeout_seconds: float) -> dict[str, Any]:
        """See ``Agents.call``; a call that does not end is left behind."""
        answers: dict[str, Any] = {}
        threads = []
        for name, call in calls.items():
            thread = threading.Thread(target=self._answer, args=(answers, name, call), daemon=True)
            thread.start()
            threads.append(thread)
        deadline = time.monotonic() + timeout_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = Failure(f"no answer within {timeout_seconds:.0f} s")
        return {name: answers.get(name, late) for name in calls}

    def close(self) -> None:
        """Close what the agents opened."""
        for agent in self._agents.values():
            agent.close()

    def _answer(self, answers: dict[str, Any], name: str, call: Call) -> None:
        method, arguments = call
        try:
            answers[name] = getattr(self._agents[name], method)(*arguments)
        except Exception as error:  # whatever fails there is a finding here
            answers[name] = Failure(f"{type(error).__name__}: {error}")
