"""Sockets that listen on one address, at any free port or at the first free one of a few.

A port is taken by listening, not by binding: with SO_REUSEADDR, without which a restart would have
to wait for old connections, two processes may bind one port, and the second is refused only then.
"""

import errno
import socket
from collections.abc import Sequence

from antiphon.errors import ConfigError

ANY_PORT = (0,)


def listen(host: str, ports: Sequence[int] = ANY_PORT) -> socket.socket:
    """Return a listening TCP socket of the caller's at the first port that is free.

    Raises:
        ConfigError: Every port is taken.
        OSError: The address is not of this machine, or a port may not be used.
    """
    for port in ports:
        taken = _try(host, port)
        if taken is not None:
            return taken
    raise ConfigError(
        f"metrics: all {len(ports)} ports from {ports[0]} on are taken at {host}; "
        "raise metrics.num_ports or choose another metrics.first_port"
    )


def _try(host: str, port: int) -> socket.socket | None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return listener
