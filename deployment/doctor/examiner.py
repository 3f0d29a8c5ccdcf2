"""Looks at the node that it runs on, and is one end of what is tried between nodes."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from antiphon.deployment.doctor.clock_server import ClockServer, look
from antiphon.deployment.doctor.facts import PathFacts
from antiphon.deployment.doctor.link_probe import measure_link, serve_link
from antiphon.deployment.doctor.machine import look_around
from antiphon.workers.handoff.selection import make_transport
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.model_shape import ModelShape
from antiphon.workers.model_source import config_folder

CONNECT_SECONDS = 3.0  # on a network that can carry a hand-off it takes milliseconds
LINK_SECONDS = 10.0  # each step of a link; the longest takes half of it on a tenth of a gigabit
_MAX_CONNECTIONS = 32


class Examiner:
    """One node's; asked one thing at a time, unless one hangs.

    Args:
        address: That other nodes reach it at.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._transports: dict[str, Transport] = {}
        self._clock_server: ClockServer | None = None

    look = staticmethod(look_around)

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
        self._clock_server = self._clock_server or ClockServer(self._address)
        return self._clock_server.address

    def reach(self, source: str, targets: dict[str, str]) -> tuple[PathFacts, ...]:
        """Connect to the ports of other nodes, by name; ``source`` is the name of this one."""

        def connect(target: str) -> PathFacts:
            return look(source, target, targets[target], CONNECT_SECONDS)

        with ThreadPoolExecutor(_MAX_CONNECTIONS) as threads:
            return tuple(threads.map(connect, targets))

    def accept_link(self, transport: str, link_id: str) -> str:
        """Begin to be the receiving end of a link; return where the sending one connects to.

        Raises:
            ConfigError: The transport cannot work here.
        """
        maker = self._transport(transport)
        address = maker.address  # starts to listen, or raises here rather than in the thread
        ends = (maker, link_id, LINK_SECONDS)
        threading.Thread(target=serve_link, args=ends, name=f"link {link_id}", daemon=True).start()
        return address

    def measure_link(
        self, transport: str, address: str, link_id: str
    ) -> tuple[float, float, float]:
        """Be the sending end of a link; see ``link_probe.measure_link``."""
        return measure_link(self._transport(transport), address, link_id, LINK_SECONDS)

    def close(self) -> None:
        """Close the ports."""
        if self._clock_server is not None:
            self._clock_server.close()
        for transport in self._transports.values():
            transport.close()

    def _transport(self, name: str) -> Transport:
        if name not in self._transports:
            self._transports[name] = make_transport(name, self._address)
        return self._transports[name]
