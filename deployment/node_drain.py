"""Empties one Ray node before it is stopped: a pod that is deleted, a machine that is rebooted.

    asked        Ray places nothing more here
    moved        Serve starts each replica of this node elsewhere, as far as there is room
    stopped      old replicas take nothing new and finish what they have
    gone         the node's proxy has ended its connections and left

Serve begins to stop a replica when its successor runs, or one grace period before the deadline if
none could be started. A node that is stopped without this takes its streams along.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray._private.services
import ray._private.state
import ray._raylet
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError

from antiphon.deployment.ray_address import find_token, reachable_head
from antiphon.errors import ConfigError

logger = logging.getLogger(__name__)

# Ray has no public call for this; what is used here is that of its own command `ray drain-node`.
_services: Any = ray._private.services
_state: Any = ray._private.state
_raylet: Any = ray._raylet
_protocol: Any = autoscaler_pb2
_POLL_SECONDS = 0.5
_SERVE = "SERVE_"  # what the names of Serve's actors begin with
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


def drain_node(
    node: str | None, within_seconds: float, report: Callable[[str], None] = logger.info
) -> bool:
    """Empty a node; False if something of Serve still ran there after ``within_seconds``.

    Args:
        node: Ray's id of the node, in hex; default: the only one with this host's address.
        within_seconds: Deadline that Serve is told, and how long to wait.
        report: Called with one line whenever less is left.

    Raises:
        ConfigError: No cluster runs here or it does not answer this program, the node cannot be
            told, or it is the head.
    """
    address = _cluster_here()
    try:
        return _empty(address, node, within_seconds, report)
    except RayError as error:
        raise ConfigError(f"cannot ask the Ray cluster at {address}: {error}") from None


def _empty(
    address: str, node: str | None, within_seconds: float, report: Callable[[str], None]
) -> bool:
    deadline = time.monotonic() + within_seconds
    cluster = _connect(address)
    node_id = node or _node_here(cluster.node_table(), address)
    if _CONTROLLER in _serve_actors(cluster, node_id):
        raise ConfigError("this is the head, which Serve's controller runs on: it cannot move")
    _ask(address, node_id, within_seconds)
    left: set[str] | None = None
    while now_left := _serve_actors(cluster, node_id):
        if now_left != left:
            report(f"waiting for {', '.join(sorted(now_left))}")
            left = now_left
        if time.monotonic() > deadline:
            report(f"still here after {within_seconds:.0f} s: {', '.join(sorted(now_left))}")
            return False
        time.sleep(_POLL_SECONDS)
    report("nothing of Serve is left on this node")
    return True


def _cluster_here() -> str:
    known = _services.get_ray_address_from_environment(None, None)
    if known is None:
        raise ConfigError("no Ray cluster runs on this machine, and RAY_ADDRESS is not set")
    try:
        found = reachable_head(known)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot ask a Ray cluster at {known}: {error}") from None
    find_token()
    return found


def _connect(address: str) -> Any:
    """Read the cluster's tables without joining it: a driver would die with the node."""
    options = _raylet.GcsClientOptions.create(
        address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True
    )
    state = _state.GlobalState()
    state._initialize_global_state(options)
    return state


def _node_here(nodes: list[Mapping[str, Any]], address: str) -> str:
    host = _services.get_node_ip_address(address)
    here = [n["NodeID"] for n in nodes if n["Alive"] and n["NodeManagerAddress"] == host]
    if len(here) != 1:
        raise ConfigError(
            f"{len(here)} Ray nodes have the address {host} of {socket.gethostname()}; "
            "name one with --node"
        )
    return str(here[0])


def _serve_actors(cluster: Any, node_id: str) -> set[str]:
    actors = cluster.actor_table(None, actor_state_name="ALIVE").values()
    names = (str(a["Name"]) for a in actors if a["Address"]["NodeID"] == node_id)
    return {name for name in names if name.startswith(_SERVE)}


def _ask(address: str, node_id: str, within_seconds: float) -> None:
    client = _raylet.GcsClient(address=address)
    accepted, reason = client.drain_node(
        node_id,
        # The other reason, idle, is refused by a node that has work.
        _protocol.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "this node is being stopped",
        int((time.time() + within_seconds) * 1000),
    )
    if not accepted:
        raise ConfigError(f"Ray does not drain node {node_id}: {reason}")
