"""Agents on the nodes of a Ray cluster: an actor on each, which reserves nothing.

Whatever an actor raises, and whether it runs at all, comes back as a ``Failure``: a node that is
suspended, cut off or without the package is a finding.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from antiphon.deployment.doctor import agent
from antiphon.deployment.doctor.facts import Node
from antiphon.deployment.doctor.survey import Arguments, Failure
from antiphon.deployment.ray_address import reachable_head
from antiphon.errors import ConfigError

_ray: Any = ray  # these lack types
_pickle: Any = ray.cloudpickle
_MAX_CONCURRENT_CALLS = 8  # one that hangs does not keep others from being answered
_NOT_OURS = ("node:", "accelerator_type:")
_MEMORY = ("memory", "object_store_memory")


class RayAgents:
    """See ``Agents``.

    Args:
        nodes: As ``ray.nodes`` lists them, those that live.
    """

    def __init__(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        self.members = tuple(members(nodes))
        start = ray.remote(agent.Agent)
        self._actors: dict[str, Any] = {
            member.name: start.options(
                num_cpus=0,
                max_concurrency=_MAX_CONCURRENT_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(member.address)
            for member, node in zip(self.members, nodes, strict=True)
        }

    def call(self, method: str, arguments: Arguments, timeout_seconds: float) -> dict[str, Any]:
        """See ``Agents.call``."""
        names = {
            self._actors[name].call.remote(method, arguments[name]): name for name in arguments
        }
        ready, _ = ray.wait(list(names), num_returns=len(names), timeout=timeout_seconds)
        late = Failure.late(timeout_seconds)
        return {**dict.fromkeys(arguments, late), **{names[ref]: _get(ref) for ref in ready}}

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors.values():
            _ray.kill(actor)


@contextmanager
def agents_of(address: str) -> Iterator[RayAgents]:
    """Join a cluster, start an agent on each living node, and end them afterwards.

    Raises:
        ConfigError: No cluster is there, or it refuses this program.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        found = reachable_head(address)
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot join a Ray cluster at {address}: {error}") from None
    _pickle.register_pickle_by_value(agent)
    try:
        agents = RayAgents([node for node in _ray.nodes() if node["Alive"]])
        try:
            yield agents
        finally:
            agents.close()
    finally:
        _pickle.unregister_pickle_by_value(agent)
        ray.shutdown()


def members(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Node]:
    """Name the nodes, and keep the resources by which workers are placed."""
    shared = Counter(node["NodeManagerAddress"] for node in nodes)
    for node in nodes:
        address = str(node["NodeManagerAddress"])
        resources = {
            name: float(amount)
            for name, amount in node["Resources"].items()
            if name not in _MEMORY and not name.startswith(_NOT_OURS)
        }
        yield Node(
            address if shared[address] == 1 else f"{address}#{node['NodeID'][:6]}",
            address,
            resources,
            int(node["Resources"].get("object_store_memory", 0)),
        )


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return Failure(f"{type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        return Failure(str(error).strip().partition("\n")[0])
