"""Ray nodes on this machine in place of pods or machines.

Run as a script with a JSON list of nodes, the head first; each holds the options of ``add_node``,
and may name the network ``namespace`` that it lives in. It prints the address, and then does what
its standard input says, a line each, and answers with the same line:

    kill N     end all processes of the node with SIGKILL
    start N    start it again, with the same options; a head comes back under its old address

SIGINT, SIGTERM and the end of its standard input end it.
"""

import json
import re
import shlex
import signal
import sys
from typing import Any

from network import enter

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


def read_address(log: str) -> str:
    """The address in what the script has printed; empty before. Ray's own lines name some, too."""
    found = re.search(r"^address (\S+)$", log, re.MULTILINE)
    return found[1] if found else ""


class Nodes:
    """The nodes that were asked for; ``Cluster`` knows the head from the others."""

    def __init__(self, wanted: list[dict[str, Any]]) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self._wanted = wanted
        self._nodes: dict[int, Any] = {}
        for number in range(len(wanted)):
            self.start(number)

    def start(self, number: int) -> None:
        """Start a node, in its namespace."""
        options = {"object_store_memory": _OBJECT_STORE_BYTES, **self._wanted[number]}
        namespace = options.pop("namespace", None)
        if namespace is not None:
            enter(namespace)
        self._nodes[number] = self.cluster.add_node(**options)

    def kill(self, number: int) -> None:
        """Lose a node, as when its machine is switched off."""
        self.cluster.remove_node(self._nodes.pop(number), allow_graceful=False)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    nodes = Nodes(json.loads(sys.argv[1]))
    print(f"address {nodes.cluster.address}", flush=True)
    try:
        for line in sys.stdin:
            word, _, number = line.strip().partition(" ")
            {"kill": nodes.kill, "start": nodes.start}[word](int(number))
            print(line.strip(), flush=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
