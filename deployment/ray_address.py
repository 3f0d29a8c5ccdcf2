"""Finds the Ray cluster that an address means, and whether somebody answers there.

``auto`` stands for ``RAY_ADDRESS``, else for what Ray noted on this machine when a cluster was last
started. That note outlives its cluster. Where nobody answers, Ray itself tries for three minutes
and then ends the process, so whoever joins a cluster asks here first.

By itself Ray looks for a token only where it is told ``auto``; whoever asked here tells it host and
port, so ``find_token`` does it. A cluster that somebody names, in ``RAY_ADDRESS`` too, is told this
machine's token only if ``RAY_AUTH_MODE`` says so.
"""

import os
import socket
from typing import Any

import ray._private.authentication.authentication_token_setup
import ray._private.services

_services: Any = ray._private.services  # these lack types
_tokens: Any = ray._private.authentication.authentication_token_setup
_CONNECT_SECONDS = 5.0


def reachable_head(address: str) -> str:
    """Resolve an address to host and port of a head that answers; with ``auto`` find its token too.

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
    if address == "auto":
        find_token()
    return str(found)


def find_token() -> None:
    """Let Ray use this machine's token for the cluster that it noted here, if there is one.

    Until the process ends: Ray keeps the mode in the environment. A mode that is set there stays.
    """
    if not os.environ.get("RAY_ADDRESS"):
        _tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
