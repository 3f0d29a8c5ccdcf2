"""Looks at the node that it runs on, and is one end of what is tried between nodes."""

import logging
import os
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from antiphon.deployment.doctor.clock_server import ClockServer, look
from antiphon.deployment.doctor.facts import ModelFacts, NodeFacts, PathFacts
from antiphon.deployment.doctor.link_probe import make_transport, measure_link, serve_link
from antiphon.deployment.doctor.machine import (
    driver_version,
    max_open_files,
    memory_bytes,
    nccl_version,
    num_cores,
    read_gpus,
    shared_memory_bytes,
    unmet_requirements,
)
from antiphon.errors import ConfigError
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.model_shape import ModelShape
from antiphon.workers.model_source import config_folder, fingerprint, resolve_model

CONNECT_SECONDS = 3.0  # on a network that can carry a hand-off it takes milliseconds
LINK_SECONDS = 10.0  # each step of a link; sending a piece takes less on a tenth of a gigabit
_SERVE_SECONDS = 2.0
_MAX_CONNECTIONS = 32


class Examiner:
    """One node's.

    Args:
        address: That other nodes reach it at.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._transports: dict[str, Transport] = {}
        self._clock_server: ClockServer | None = None

    def look(self, source: str, http_host: str, http_port: int) -> NodeFacts:
        """Everything about this node alone.

        Args:
            source: Of the model.
            http_host: That the endpoint will listen on.
            http_port: The same.
        """
        gpus, gpu_error = read_gpus()
        total, free = memory_bytes()
        return NodeFacts(
            unmet=unmet_requirements(),
            nccl=nccl_version(),
            driver=driver_version(),
            gpus=gpus,
            gpu_error=gpu_error,
            cores=num_cores(),
            memory_bytes=total,
            free_bytes=free,
            shared_memory_bytes=shared_memory_bytes(),
            max_open_files=max_open_files(),
            wait_policy=os.environ.get("OMP_WAIT_POLICY"),
            http_error=http_error(http_host, http_port),
            model=find_model(source),
        )

    def shape(self, source: str) -> ModelShape:
        """What the model costs.

        Raises:
            ConfigError: It is not here, or cannot be counted.
        """
        from antiphon.workers.shape_reader import read_shape  # transformers takes seconds to import

        logging.getLogger("transformers").setLevel(logging.ERROR)
        return read_shape(config_folder(source))

    def listen(self) -> str:
        """Open a port as workers do, on this node's address; return where it is.

        Raises:
            OSError: The node does not have its address.
        """
        with self._lock:
            if self._clock_server is None:
                self._clock_server = ClockServer(self._address)
            return self._clock_server.address

    def reach(self, source: str, targets: dict[str, str]) -> tuple[PathFacts, ...]:
        """Connect to the ports of other nodes, by name; ``source`` is the name of this one."""
        with ThreadPoolExecutor(_MAX_CONNECTIONS) as threads:
            looks = [
                threads.submit(look, source, target, address, CONNECT_SECONDS)
                for target, address in targets.items()
            ]
            return tuple(one.result() for one in looks)

    def accept_link(self, transport: str, link_id: str) -> str:
        """Begin to be the receiving end of a link; return where the sending one connects to.

        Raises:
            ConfigError: The transport cannot work here.
        """
        maker = self._transport(transport)
        address = maker.address  # starts to listen, or raises here rather than in the thread
        serve = partial(serve_link, maker, link_id, LINK_SECONDS)
        threading.Thread(target=serve, name=f"link {link_id}", daemon=True).start()
        return address

    def measure_link(
        self, transport: str, address: str, link_id: str
    ) -> tuple[float, float, float]:
        """Be the sending end of a link; see ``link_probe.measure_link``."""
        return measure_link(self._transport(transport), address, link_id, LINK_SECONDS)

    def close(self) -> None:
        """Close the ports."""
        with self._lock:
            if self._clock_server is not None:
                self._clock_server.close()
            for transport in self._transports.values():
                transport.close()

    def _transport(self, name: str) -> Transport:
        with self._lock:
            if name not in self._transports:
                self._transports[name] = make_transport(name, self._address)
            return self._transports[name]


class _NotReadyError(Exception):
    """The model would have to be made first."""


def find_model(source: str) -> ModelFacts:
    """Look for a model as a worker does when it starts, but neither convert nor download it."""

    def stop(before: str) -> None:
        raise _NotReadyError(before)

    try:
        return ModelFacts(fingerprint(resolve_model(source, stop)))
    except _NotReadyError as error:
        return ModelFacts(error=f"not ready: a worker would begin with {error}", is_to_be_made=True)
    except ConfigError as error:
        return ModelFacts(error=str(error))


def http_error(host: str, port: int) -> str | None:
    """Why a port cannot be listened on; a running Serve proxy is no reason."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return None if _is_serve(host, port) else f"{host}:{port}: {error.strerror}"
    return None


def _is_serve(host: str, port: int) -> bool:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    try:
        url = f"http://{reachable}:{port}/-/healthz"
        with urllib.request.urlopen(url, timeout=_SERVE_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
