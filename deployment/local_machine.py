"""What a Ray of its own offers on this machine, and what of it the workers get.

CPUs are offered as workers ask for them, because several on one core are merely slow. GPUs and
other resources are what is there: Serve would wait for more without end.
"""

import math
import os
from collections.abc import Callable, Mapping

from antiphon.config import AntiphonConfig
from antiphon.deployment.doctor.facts import Node
from antiphon.deployment.doctor.placement import ingress_needs, needs, place
from antiphon.errors import ConfigError

OBJECT_STORE_BYTES = 128 * 2**20  # requests do not pass through it


def local_cpus(config: AntiphonConfig) -> int:
    """CPUs that a Ray of its own offers: this machine's, or more if the workers reserve more."""
    needed = sum(pool.replicas * pool.num_cpus for pool in config.pools.values())
    return max(os.cpu_count() or 1, math.ceil(needed))


def usable_gpus(offered: Mapping[str, float], report: Callable[[str], None]) -> int:
    """GPUs of this machine that torch can use, of those that Ray offers."""
    num_gpus = int(offered.get("GPU", 0))
    if not num_gpus:
        return 0
    import torch  # takes seconds

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable < num_gpus:
        report(f"torch can use {usable} of {num_gpus} GPUs: antiphon doctor says why")
    return min(usable, num_gpus)


def _without_gpus(config: AntiphonConfig, num_gpus: int) -> list[str]:
    """The pools that could have GPUs where no pool has one, and of which nobody has said so.

    Args:
        config: As it was written; a pool that names ``num_gpus``, be it 0, was decided about.
        num_gpus: That there are.
    """
    if not num_gpus or any(pool.num_gpus for pool in config.pools.values()):
        return []
    return [
        role for role, pool in config.pools.items()
        if "num_gpus" not in pool.model_fields_set and pool.engine.device != "cpu"
    ]  # fmt: skip


def with_gpus(
    config: AntiphonConfig, num_gpus: int, report: Callable[[str], None]
) -> AntiphonConfig:
    """Give each worker that nobody has decided about one of this machine's GPUs, if they suffice.

    Args:
        report: Called with lines on which it is, where there are GPUs.
    """
    roles = _without_gpus(config, num_gpus)
    num_workers = sum(config.pools[role].replicas for role in roles)
    if num_workers > num_gpus:
        report(
            f"no GPU is used: this machine has {num_gpus} for {num_workers} workers; start fewer, "
            "or say with <pool>.num_gpus who gets one"
        )
        return config
    if roles:
        report(f"one GPU for each of {num_workers} workers, of {num_gpus} here")
    given = {role: config.pools[role].model_copy(update={"num_gpus": 1.0}) for role in roles}
    config = config.model_copy(update=given)
    if num_gpus:
        report_cpus(config, report)
    return config


def report_cpus(config: AntiphonConfig, report: Callable[[str], None]) -> None:
    """Say whose workers could use GPUs and reserve none."""
    idle = [
        r for r, pool in config.pools.items() if not pool.num_gpus and pool.engine.device == "auto"
    ]
    if idle:
        report(f"on CPUs, though there are GPUs, because num_gpus reserves none: {', '.join(idle)}")


def check_room(config: AntiphonConfig, offered: Mapping[str, float]) -> None:
    """See that all workers and ingresses fit on this machine.

    Args:
        offered: Ray's resources here, all free.

    Raises:
        ConfigError: Names what finds no place, what it asks for, and what there is of that.
    """
    placement = place(config, [Node("here", "127.0.0.1", offered, 0)])
    lines = [
        _short(role, missing, config.pools[role].replicas, needs(config.pools[role]), offered)
        for role, missing in placement.missing.items()
    ]
    if missing := placement.missing_ingresses:
        http = config.http
        lines += [_short("ingress", missing, http.ingress_replicas, ingress_needs(http), offered)]
    if lines:
        raise ConfigError(
            "this machine does not have what the configuration asks for:\n"
            + "\n".join(lines)
            + "\nlower replicas, num_gpus or resources, or name a Ray cluster with --address"
        )


def _short(
    name: str, missing: int, number: int, wanted: Mapping[str, float], offered: Mapping[str, float]
) -> str:
    here = {resource: offered.get(resource, 0.0) for resource in wanted}
    return (
        f"  {name}: no place for {missing} of {number}; each asks for {_named(wanted)}; here are "
        f"{_named(here)}"
    )


def _named(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in amounts.items())
