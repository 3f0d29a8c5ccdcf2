"""Ray nodes on this machine in place of pods or machines.

Run as a script with a JSON list of nodes, the head first; each holds the options of ``add_node``,
and may name the network ``namespace`` that it lives in. It prints the address, and then does what
its standard input says, a line each, and answers with the same line:

    kill N         end all processes in the node's namespace with SIGKILL, at once
    start N M ...  start them again; a head comes back under its old address

SIGINT, SIGTERM and the end of its standard input end it. Where it is itself killed, what it started
lives on: ``Product.kill`` finds that.
"""

import itertools
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from network import enter, kill_all_in

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


def shell(folder: Path, address: str) -> dict[str, str]:
    """The environment of a shell on a machine of this process's cluster that asks for a token.

    Ray's note of the cluster and the token are in files, and no variable speaks of either.
    """
    token = folder / "home/.ray/auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text(os.environ["RAY_AUTH_TOKEN"])
    (folder / "ray").mkdir()
    (folder / "ray/ray_current_cluster").write_text(address)
    unset = {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "HOME": str(folder / "home"), "RAY_TMPDIR": str(folder)}


def read_address(log: str) -> str:
    """The address in what the script has printed; empty before. Ray's own lines name some, too."""
    found = re.search(r"^address (\S+)$", log, re.MULTILINE)
    return found[1] if found else ""


class Nodes:
    """The nodes that were asked for; ``Cluster`` knows the head from the others."""

    def __init__(self, wanted: list[dict[str, Any]], folder: str) -> None:
        from ray.cluster_utils import Cluster

        # Ray's own clean-up at exit needs the main thread, and ends a node with its thread.
        self.cluster = Cluster(shutdown_at_exit=False)
        self._wanted = wanted
        self._folder = folder
        self._starts = itertools.count()
        self._nodes: dict[int, Any] = {}
        self.start([0])
        self.start(range(1, len(wanted)))

    def start(self, numbers: Sequence[int]) -> None:
        """Start nodes, two at a time, and once more those in namespaces that Ray gave up.

        It gives a node half a minute, which may not do where others use the cores.
        """
        with ThreadPoolExecutor(2) as threads:
            starting = {number: threads.submit(self._start, number) for number in numbers}
            for number, started in starting.items():
                namespace = self._wanted[number].get("namespace")
                if started.exception() is not None and namespace is not None:
                    kill_all_in(namespace)
                    started = threads.submit(self._start, number)
                started.result()

    def kill(self, numbers: Sequence[int]) -> None:
        """Lose nodes, as when their machines are switched off: Ray alone would go one by one."""
        for number in numbers:
            kill_all_in(self._wanted[number]["namespace"])
            self.cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def _start(self, number: int) -> None:
        options = {"object_store_memory": _OBJECT_STORE_BYTES, **self._wanted[number]}
        namespace = options.pop("namespace", None)
        if namespace is not None:
            enter(namespace)
        # Ray's choice is the first free name, which another thread finds free, too.
        socket = f"{self._folder}/{next(self._starts)}"
        sockets = {"raylet_socket_name": f"{socket}r", "plasma_store_socket_name": f"{socket}p"}
        self._nodes[number] = self.cluster.add_node(**options, **sockets)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Of its own, within that of the tests: Ray notes there that this cluster exists.
    within = os.environ.get("RAY_TMPDIR", "/tmp")
    with tempfile.TemporaryDirectory(prefix="n", dir=within, ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        nodes = Nodes(json.loads(sys.argv[1]), folder)
        print(f"address {nodes.cluster.address}", flush=True)
        try:
            for line in sys.stdin:
                word, *numbers = line.split()
                {"kill": nodes.kill, "start": nodes.start}[word]([int(n) for n in numbers])
                print(line.strip(), flush=True)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
