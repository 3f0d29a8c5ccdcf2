"""Ray nodes on this machine in place of pods, each with what a pod of the chart would offer.

Run as a script with a JSON list of nodes, the head first; prints the address, and ends with SIGINT.
"""

import json
import shlex
import signal
import sys
import threading
from typing import Any

_OBJECT_STORE_BYTES = 90 * 2**20


def node_options(start_params: dict[str, str]) -> dict[str, Any]:
    """The options of one node from ``rayStartParams``, read the way KubeRay's shell reads them."""
    (resources,) = shlex.split(start_params.get("resources", "'{}'"))
    return {
        "num_cpus": int(start_params["num-cpus"]),
        "num_gpus": int(start_params["num-gpus"]),
        "resources": json.loads(resources),
        "object_store_memory": _OBJECT_STORE_BYTES,
    }


def main() -> None:
    from ray.cluster_utils import Cluster

    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    cluster = Cluster()
    for options in json.loads(sys.argv[1]):
        cluster.add_node(**options)
    print(f"address {cluster.address}", flush=True)
    stop.wait()
    cluster.shutdown()


if __name__ == "__main__":
    main()
