"""Where the endpoint listens: whether it can, and at which address this machine reaches it."""

import http.client
import socket
import urllib.request

_SERVE_SECONDS = 2.0  # for its proxy to answer, where one listens
_SERVE_ANSWER = b"success"  # others answer 200 too: Ray's metrics do to any path
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # of an address that stands for all


def base_url(host: str, port: int) -> str:
    """Of what listens on ``host``, for clients on this machine."""
    reachable = _REACHABLE.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def direct_opener() -> urllib.request.OpenerDirector:
    """For URLs of this machine, which a proxy of the environment would look for on its own."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def listen_error(host: str, port: int) -> str | None:
    """Why nobody can listen at an address of this machine; None if one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"{host}:{port}: {error.strerror or error}"
    return None


def serve_listen_error(host: str, port: int) -> str | None:
    """Why Serve cannot listen at an address of this machine; None if it can, or does already."""
    error = listen_error(host, port)
    return None if error is None or is_serve(host, port, _SERVE_SECONDS) else error


def is_serve(host: str, port: int, timeout_seconds: float) -> bool:
    """Whether Serve's proxy listens at an address of this machine, and is well."""
    reachable = _REACHABLE.get(host, host)
    connection = http.client.HTTPConnection(reachable, port, timeout=timeout_seconds)
    try:
        connection.request("GET", "/-/healthz")
        answer = connection.getresponse()
        is_ok = answer.status == http.HTTPStatus.OK
        return is_ok and answer.read(len(_SERVE_ANSWER)) == _SERVE_ANSWER
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
