"""What an ingress knows of the workers for Prometheus, read when it scrapes.

A worker's samples are gone as soon as it is: nothing is kept but what the view holds.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from antiphon.messages import Role
from antiphon.metrics import gauge_family
from antiphon.router.telemetry_view import ClusterView
from antiphon.vllm_names import WorkerState

_ROLE = "ingress"


class ClusterCollector(Collector):
    """Renders a view of the cluster; on the event loop that changes it.

    Args:
        pools: Those that are configured: a pool without a worker counts 0, another is not there.

    Attributes:
        num_wanted: Asked for how many workers a pool is to have; one of which nobody has said so
            is not there.
    """

    def __init__(self, view: ClusterView, pools: Iterable[Role]) -> None:
        self._view = view
        self._pools = tuple(pools)
        self.num_wanted: Callable[[], Mapping[Role, int]] = dict

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        now = time.monotonic()
        views = self._view.views
        pools: Counter[str] = Counter({role.value: 0 for role in self._pools})
        pools.update(view.card.role.value for view in views)
        yield gauge_family(
            "antiphon_router_workers",
            "Workers that this ingress can route to, or that drain.",
            ["role", "pool"],
            {(_ROLE, pool): count for pool, count in pools.items()},
        )
        yield gauge_family(
            "antiphon_workers_wanted",
            "Workers that Serve is to run.",
            ["role", "pool"],
            {(_ROLE, pool.value): count for pool, count in self.num_wanted().items()},
        )
        yield gauge_family(
            "antiphon_router_index_blocks",
            "KV blocks in a worker's cache, as this ingress knows.",
            ["role", "worker"],
            {
                (_ROLE, v.card.replica_id): self._view.num_indexed_blocks(v.card.incarnation)
                for v in views
            },
        )
        yield gauge_family(
            "antiphon_router_view_age_seconds",
            "Since a worker's last report; one that is idle has nothing to report.",
            ["role", "worker"],
            {(_ROLE, v.card.replica_id): v.age_seconds(now) for v in views},
        )


def worker_states(view: ClusterView) -> list[WorkerState]:
    """Of the workers whose part it is to generate."""
    return [
        WorkerState(
            num_waiting=each.load.num_waiting,
            num_running=each.load.num_running,
            num_used_blocks=each.card.num_blocks - each.load.num_free_blocks,
            num_blocks=each.card.num_blocks,
            block_size=each.card.block_size,
        )
        for each in view.views
        if each.card.role is not Role.PREFILL
    ]
