"""Where workers and ingresses may go: which nodes can hold one, and whether all find a place.

Ray places by resources. The packing here is greedy, as Ray's is: pools that fewest nodes can hold
come first, and nodes that offer least besides what the pool needs. Ingresses take what is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antiphon.config import AntiphonConfig, HttpConfig, PoolConfig
from antiphon.deployment.doctor.facts import Node

_ROUNDING = 1e-6  # Ray counts resources in ten thousandths


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers by node and role, and how many of each role, and of the ingresses, found no place."""

    placed: Mapping[str, Mapping[str, int]]
    missing: Mapping[str, int]
    missing_ingresses: int


def needs(pool: PoolConfig) -> dict[str, float]:
    """Ray's resources of one worker; none that is 0."""
    return _positive({"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources})


def ingress_needs(http: HttpConfig) -> dict[str, float]:
    """Ray's resources of one ingress; none that is 0, and no CPU."""
    return _positive(http.resources)


def nodes_for(config: AntiphonConfig, role: str, members: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes that can hold a worker of a role if they are empty; none for a pool of none."""
    wanted = needs(config.pools[role]) if role in config.pools else None
    return tuple(node for node in members if wanted is not None and _has(node.resources, wanted))


def hosts(config: AntiphonConfig, members: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes that can hold a worker of any role, or an ingress, if they are empty."""
    wanted = [*map(needs, config.pools.values()), ingress_needs(config.http)]
    return tuple(node for node in members if any(_has(node.resources, each) for each in wanted))


def place(config: AntiphonConfig, members: Sequence[Node]) -> Placement:
    """Find a place for every worker and ingress on nodes that hold nothing else."""
    free = {node.name: dict(node.resources) for node in members}
    placed: dict[str, dict[str, int]] = {node.name: {} for node in members}
    missing: dict[str, int] = {}
    roles = sorted(config.pools, key=lambda role: len(nodes_for(config, role, members)))
    for role in roles:
        wanted = needs(config.pools[role])
        for _ in range(config.pools[role].replicas):
            names = [name for name, resources in free.items() if _has(resources, wanted)]
            if not names:
                missing[role] = missing.get(role, 0) + 1
                continue
            name = min(names, key=lambda name: _waste(free[name], wanted, placed[name]))
            placed[name][role] = placed[name].get(role, 0) + 1
            _take(free[name], wanted)
    return Placement(placed, missing, _missing_ingresses(config.http, free))


def _missing_ingresses(http: HttpConfig, free: Mapping[str, dict[str, float]]) -> int:
    wanted = ingress_needs(http)
    for count in range(http.ingress_replicas):
        node = next((node for node in free.values() if _has(node, wanted)), None)
        if node is None:
            return http.ingress_replicas - count
        _take(node, wanted)
    return 0


def _positive(wanted: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in wanted.items() if amount > 0}


def _take(free: dict[str, float], wanted: Mapping[str, float]) -> None:
    for resource, amount in wanted.items():
        free[resource] -= amount


def _has(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) + _ROUNDING >= amount for name, amount in wanted.items())


def _waste(
    resources: Mapping[str, float], wanted: Mapping[str, float], workers: Mapping[str, int]
) -> tuple[int, int]:
    """What a worker here would keep others from, then how many are here."""
    others = [name for name, amount in resources.items() if amount > 0 and name not in wanted]
    return len(others), sum(workers.values())
