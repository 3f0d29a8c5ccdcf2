"""Where workers may go: which nodes can hold one of a pool, and whether all of them find a place.

Ray places by resources. The packing here is greedy, as Ray's is: pools that fewest nodes can hold
come first, and nodes that offer least besides what the pool needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antiphon.config import AntiphonConfig, PoolConfig
from antiphon.deployment.doctor.facts import Node

_ROUNDING = 1e-6  # Ray counts resources in ten thousandths


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers by node and role, and how many of each role found no place."""

    placed: Mapping[str, Mapping[str, int]]
    missing: Mapping[str, int]


def needs(pool: PoolConfig) -> dict[str, float]:
    """Ray's resources of one worker; none that is 0."""
    wanted = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def nodes_for(config: AntiphonConfig, role: str, members: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes that can hold a worker of a role if they are empty; none for a pool of none."""
    wanted = needs(config.pools[role]) if role in config.pools else None
    return tuple(node for node in members if wanted is not None and _has(node.resources, wanted))


def place(config: AntiphonConfig, members: Sequence[Node]) -> Placement:
    """Find a place for every worker on nodes that hold nothing else."""
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
            for resource, amount in wanted.items():
                free[name][resource] -= amount
    return Placement(placed, missing)


def _has(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) + _ROUNDING >= amount for name, amount in wanted.items())


def _waste(
    resources: Mapping[str, float], wanted: Mapping[str, float], workers: Mapping[str, int]
) -> tuple[int, int]:
    """What a worker here would keep others from, then how many are here."""
    others = [name for name, amount in resources.items() if amount > 0 and name not in wanted]
    return len(others), sum(workers.values())
