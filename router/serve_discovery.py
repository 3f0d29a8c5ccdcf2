"""The adapter to Ray Serve: learn the workers of a deployment from Serve's own list of replicas.

A worker replica returns its card from ``record_replica_metadata``. Serve calls that once, when the
replica has been constructed and before it counts as running, and sends the result to every router
with the list of running replicas. So a replica is never listed without its card, and nothing is
polled. (``record_routing_stats`` arrives after the replica does, and is asked for in every period.)

Serve pickles this module by value into every process that routes to the deployment: it must hold no
state, and refer to none but through imported functions. See ``discovery``.
"""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from antiphon.messages import WorkerCard
from antiphon.router import discovery

logger = logging.getLogger(__name__)

ROUTER_CLASS = "antiphon.router.serve_discovery.DiscoveringRouter"


class DiscoveringRouter(FIFOMixin, RequestRouter):
    """Publishes the cards of a deployment's replicas, and sends calls to the shortest queue.

    Requests do not pass here; only control calls do. ``FIFOMixin`` is needed all the same: without
    it, calls made inside one parent request are mistaken for each other and never return.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in the running replicas; called on Serve's router thread at every change."""
        super().update_replicas(replicas)
        cards = {}
        for replica in replicas:
            card = _card_of(replica)
            if card is not None:
                cards[replica.replica_id.unique_id] = card
        deployment_id = self._deployment_id
        discovery.publish((deployment_id.app_name, deployment_id.name), cards)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Offer all replicas; Serve takes the one with the shortest queue."""
        if pending_request is not None:
            # Without it Serve asks again at once, and spins while every replica is full.
            pending_request.routing_context.should_backoff = True
        return [candidate_replicas]


class WorkerWatch:
    """Keeps a listener informed of the workers of a deployment until it is closed.

    It holds the handle: Serve stops updating a handle that nobody refers to.

    Args:
        handle: Of a deployment whose ``request_router_class`` is ``ROUTER_CLASS``.
        listener: Gets the cards of all running replicas by replica id, soon after construction and
            at every change, on another thread: see ``WorkerDirectory.listen``. A replica
            that is being stopped is no longer listed, though it may still finish its requests.
    """

    def __init__(self, handle: DeploymentHandle[Any], listener: discovery.Listener) -> None:
        # options() creates the handle's router, which asks for the replicas by itself: no call
        # to a replica is needed, and a deployment may have none yet.
        self._handle: DeploymentHandle[Any] | None = handle.options()
        deployment = (handle.app_name, handle.deployment_name)
        self._stop: Callable[[], None] = discovery.DIRECTORY.listen(deployment, listener)

    @property
    def num_wanted(self) -> int | None:
        """How many replicas Serve is to run; None where it has said no number, and after ``close``.

        Serve sends every handle the configuration of its deployment, at first and at each change,
        and keeps it for itself: the way there is that of the one version that is required.
        """
        if self._handle is None:
            return None
        router: Any = self._handle._router
        config = router._asyncio_router._metrics_manager._deployment_config
        # A file deployed by hand may leave the number to Serve.
        return None if config is None else config.num_replicas

    def close(self) -> None:
        """Stop; after this the listener is not called again."""
        self._stop()
        self._handle = None


def _card_of(replica: RunningReplica) -> WorkerCard | None:
    try:
        return discovery.unpack_card(replica.replica_metadata)
    except msgspec.ValidationError as error:
        # Raising here would end Serve's updates of this handle for good.
        logger.error(
            "replica %s is ignored, because its metadata holds no usable worker card: %s; "
            "does its deployment define record_replica_metadata, with the same version?",
            replica.replica_id.unique_id,
            error,
        )
        return None
