"""Who may open a session: whoever was told the worker's key.

    worker starts        a fresh key, in its card
    Serve                carries the card to every ingress, over its own channels
    ingress              tells decode workers the keys of prefill workers (``PrefillPeer``)
    client               Authorization: Bearer KEY, in the WebSocket's handshake

Nobody has to set anything up, and nothing is shared: a key opens one worker, for one incarnation of
it. It proves that a client belongs to this deployment. It hides nothing from who can read the
network, because sessions are not encrypted.
"""

import hmac
import secrets
from collections.abc import Mapping

_KEY_BYTES = 32
_HEADER = "Authorization"


def new_session_key() -> str:
    """Make the key of one incarnation."""
    return secrets.token_urlsafe(_KEY_BYTES)


def with_key(session_key: str) -> dict[str, str]:
    """Headers of a client that knows the key."""
    return {_HEADER: f"Bearer {session_key}"}


def knows_key(headers: Mapping[str, str], session_key: str) -> bool:
    """Whether a client sent the key; takes the same time for every wrong one."""
    sent = headers.get(_HEADER, "").encode("utf-8", "surrogateescape")
    return hmac.compare_digest(sent, with_key(session_key)[_HEADER].encode())
