"""Finds the Ray cluster that an address means, and whether somebody answers there.

``auto`` stands for ``RAY_ADDRESS``, else for what Ray noted on this machine when a cluster was last
started. That note outlives its cluster. Where nobody answers, Ray itself tries for three minutes
and then ends the process, so whoever joins a cluster asks here first.
"""

import socket
from typing import Any

import ray._private.services

_services: Any = ray._private.services  # lacks types
_CONNECT_SECONDS = 5.0


def reachable_head(address: str) -> str:
    """Resolve an address, ``auto`` included, to host and port of a head that answers.

    Raises:
        OSError: No cluster is known, or nobody answers at its address, which the message names.
        ValueError: It is no address of a head.
    """
    found = _services.canonicalize_bootstrap_address(address)
    if found is None:
        raise ValueError("an address is host:port of the head, or auto")
    host, _, port = str(found).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise OSError(f"nobody answers at {found}: {error}") from error
    return str(found)
